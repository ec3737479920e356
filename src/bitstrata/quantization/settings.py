"""What a quantization job is asked to do, checked as far as it can be without looking at any file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import arguments
from ..errors import BitstrataError, PreflightError, UsageError
from ..models.load import pick_device
from ..planes import whole_number
from ..planes.weights import MAX_BITS
from ..plans import parse_bits
from ..solvers import RTN, Method, make_method

MODEL_HINT = "give a folder or a hub id; a model in memory: save_pretrained writes such a folder"
TEXT_HINT = "write the texts into a file, separated by <|endoftext|>, and give its name"


@dataclass(frozen=True)
class Settings:
    """A job's arguments, parsed. `calibration` is a file, the name of a built-in text, or None."""

    model: str
    output: Path
    bits: tuple[int, ...]
    method: Method
    preset: str
    group_size: int
    calibration: str | None
    num_samples: int
    seq_len: int
    skip: tuple[str, ...]
    seed: int
    device: torch.device
    head_bits: int | None = None

    @classmethod
    def parse(
        cls,
        model: str | Path,
        output: str | Path,
        *,
        bits: str | int | Iterable[int],
        method: str,
        preset: str,
        options: Mapping[str, Any],
        group_size: int,
        calibration: str | Path | None,
        num_samples: int,
        seq_len: int,
        skip: str | Sequence[str],
        seed: int,
        device: str,
        head_bits: int | None = None,
        problems: list[BitstrataError] | None = None,
    ) -> Settings:
        """Check the arguments; what is wrong is appended to `problems`, and a usual value stands in for it.

        Without `problems`, raises PreflightError with everything that is wrong.
        """
        raising = problems is None
        problems = [] if problems is None else problems

        def attempt(make: Any, fallback: Any) -> Any:
            try:
                return make()
            except BitstrataError as error:
                problems.append(error)
                return fallback

        # without these nothing else can be looked at
        source = attempt(lambda: arguments.path("the model", model, hint=MODEL_HINT), None)
        target = attempt(lambda: arguments.path("the output", output, hint="give the folder to make"), None)
        parsed_bits = attempt(lambda: parse_bits(bits), (4,))
        parsed_method = attempt(lambda: make_method(method, preset, options), RTN())
        parsed_device = attempt(lambda: pick_device(device), torch.device("cpu"))

        def number(name: str, value: object, least: int, usual: int) -> int:
            hint = f"the default is {usual}"
            return int(attempt(lambda: arguments.number(f"--{name}", value, least, hint=hint), usual))

        group_size, num_samples = number("group-size", group_size, 1, 128), number("num-samples", num_samples, 1, 128)
        seq_len, seed = number("seq-len", seq_len, 2, 2048), number("seed", seed, 0, 0)
        if head_bits is not None:
            head_bits = attempt(lambda: _head_bits(head_bits), None)
        text = None
        if calibration is not None:
            text = attempt(lambda: arguments.path("--calibration", calibration, hint=TEXT_HINT), None)
        skip = attempt(lambda: _patterns(skip), ())
        bad = dict(_bad_patterns(skip))
        problems.extend(bad.values())
        skip = [pattern for pattern in skip if pattern not in bad]
        if not parsed_method.nests and len(parsed_bits) > 1:
            problems.append(
                UsageError(
                    f"method {parsed_method.name} makes one precision a file, got {len(parsed_bits)} bits values",
                    hint=f"give one of them, such as --bits {parsed_bits[-1]}, or use --method nested",
                )
            )
        if parsed_method.needs_calibration and calibration is None:
            problems.append(
                UsageError(
                    f"method {parsed_method.name} needs calibration text at preset {preset!r}",
                    hint="give --calibration FILE (or the built-in text `stdlib`), or use --preset fast",
                )
            )
        if problems and (raising or source is None or target is None):
            raise PreflightError(problems)
        return cls(
            source,
            Path(target),
            parsed_bits,
            parsed_method,
            preset,
            group_size,
            text,
            num_samples,
            seq_len,
            tuple(skip),
            seed,
            parsed_device,
            head_bits,
        )

    def fingerprint(self) -> dict[str, Any]:
        """The arguments that decide the result, as JSON values."""
        return {
            "bits": list(self.bits),
            "method": self.method.name,
            "preset": self.preset,
            "options": dataclasses.asdict(self.method),
            "group_size": self.group_size,
            "num_samples": self.num_samples,
            "seq_len": self.seq_len,
            "skip": list(self.skip),
            "seed": self.seed,
            "device": self.device.type,
            **({} if self.head_bits is None else {"head_bits": self.head_bits}),
        }


def _head_bits(value: object) -> int:
    found = whole_number(value)
    if found is None or not 1 <= found <= MAX_BITS:
        raise UsageError(
            f"--head-bits must be a whole number from 1 to {MAX_BITS}, got {arguments.shown(value)}",
            hint="4 to 8 are usual; leave it out to keep the output head and the embedding as they are",
        )
    return found


def _patterns(skip: object) -> tuple[str, ...]:
    """One pattern, or several."""
    if isinstance(skip, str):
        return (skip,)
    found = tuple(skip) if isinstance(skip, Iterable) else (None,)
    if not all(isinstance(pattern, str) for pattern in found):
        raise UsageError(f"--skip must be patterns of names, got {arguments.shown(skip)}", hint='such as "*.down_proj"')
    return found


def _bad_patterns(skip: Sequence[str]) -> Iterator[tuple[str, UsageError]]:
    for pattern in skip:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                message = f"--skip {pattern} is not a regular expression: {error}"
                yield pattern, UsageError(message, hint="or use a glob: *.down_proj")
