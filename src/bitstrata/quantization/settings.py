"""What a quantization job is asked to do, checked as far as it can be without looking at any file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from .. import arguments
from ..calibration.block_runner import half_products
from ..errors import BitstrataError, PreflightError, UsageError
from ..models.hub import DEFAULT
from ..models.load import pick_device
from ..options import FromHub, QuantizeOptions
from ..planes import whole_number
from ..planes.weights import MAX_BITS
from ..plans import parse_bits
from ..solvers import RTN, Method, make_method
from ..solvers.method import MomentsMethod
from .team import check_size

T = TypeVar("T")
DTYPES = ("auto", "bfloat16", "float32")
MODEL_HINT = "give a folder or a hub id; a model in memory: save_pretrained writes such a folder"
TEXT_HINT = "write the texts into a file, separated by <|endoftext|>, and give its name"


@dataclass(frozen=True)
class Settings:
    """A job's arguments, parsed. `calibration`: what `read_mix` takes, or None."""

    model: str
    output: Path
    bits: tuple[int, ...]
    method: Method
    preset: str
    group_size: int
    calibration: str | tuple[Any, ...] | None
    num_samples: int
    seq_len: int
    skip: tuple[str, ...]
    seed: int
    device: torch.device
    head_bits: int | None = None
    drop_mtp: bool = False
    dtype: torch.dtype = torch.float32  # of products while calibrating
    time_budget: float | None = None  # in seconds; not part of the fingerprint: what it leads to is
    devices: tuple[torch.device, ...] = ()  # each has a process; none where there is one, or a launcher
    processes: int = 1  # that work on the job
    here: int = 1  # of them, on this machine
    hub: FromHub = DEFAULT  # how a hub id is fetched; not part of the fingerprint either: the files are

    @classmethod
    def parse(cls, options: QuantizeOptions, problems: list[BitstrataError] | None = None) -> Settings:
        """Check the options; what is wrong is appended to `problems`, and a usual value stands in for it.

        Without `problems`, raises PreflightError with everything that is wrong.
        """
        found = [] if problems is None else problems
        usual: dict[str, Any] = {one.name: one.default for one in dataclasses.fields(options)}

        def attempt(make: Callable[[], T], instead: T) -> T:
            try:
                return make()
            except BitstrataError as error:
                found.append(error)
                return instead

        def number(name: str, least: int) -> int:
            flag, default, given = f"--{name.replace('_', '-')}", int(usual[name]), getattr(options, name)
            return attempt(lambda: arguments.number(flag, given, least, hint=f"the default is {default}"), default)

        def path(name: str, value: object, hint: str) -> str | None:
            return attempt(lambda: arguments.path(name, value, hint=hint), None)

        # without these nothing else can be looked at
        source = path("the model", options.model, MODEL_HINT)
        target = path("the output", options.output, "give the folder to make")
        bits: tuple[int, ...] = attempt(lambda: parse_bits(options.bits), (4,))
        rtn: Method = RTN()
        none: tuple[torch.device, ...] = ()
        method = attempt(lambda: make_method(options.method, options.preset, options.options or {}), rtn)
        parsed: dict[str, Any] = {
            "devices": attempt(lambda: _devices(options.devices, options.device), none),
            "device": attempt(lambda: pick_device(options.device), torch.device("cpu")),
            "group_size": number("group_size", 1),
            "num_samples": number("num_samples", 1),
            "seq_len": number("seq_len", 2),
            "seed": number("seed", 0),
            "head_bits": attempt(lambda: _head_bits(options.head_bits), None),
            "calibration": None,
            "drop_mtp": bool(options.drop_mtp),
            "time_budget": None,
            "hub": options.hub,
        }
        if options.devices is not None:
            parsed["device"] = next(iter(parsed["devices"]), torch.device("cpu"))
            if len(parsed["devices"]) == 1:
                parsed["devices"] = ()
        parsed["dtype"] = attempt(lambda: _dtype(options.dtype, method, parsed["device"]), torch.float32)
        if options.time_budget is not None:
            parsed["time_budget"] = attempt(lambda: arguments.duration("--time-budget", options.time_budget), None)
        if options.calibration is not None:
            given = options.calibration
            parsed["calibration"] = (
                tuple(given) if isinstance(given, (list, tuple)) else path("--calibration", given, TEXT_HINT)
            )
        skip: tuple[str, ...] = attempt(lambda: _patterns(options.skip), ())
        bad = dict(_bad_patterns(skip))
        parsed["skip"] = tuple(pattern for pattern in skip if pattern not in bad)
        found += [*bad.values(), *_mismatches(method, bits, options)]
        if source is None or target is None or (found and problems is None):
            raise PreflightError(found)
        return cls(model=source, output=Path(target), bits=bits, method=method, preset=options.preset, **parsed)

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
            **({"drop_mtp": True} if self.drop_mtp else {}),
            **({} if self.dtype == torch.float32 else {"dtype": str(self.dtype).removeprefix("torch.")}),
        }


def _mismatches(method: Method, bits: tuple[int, ...], options: QuantizeOptions) -> Iterator[UsageError]:
    """What the method cannot do with the other options."""
    if not method.nests and len(bits) > 1:
        yield UsageError(
            f"method {method.name} makes one precision a file, got {len(bits)} bits values",
            hint=f"give one of them, such as --bits {bits[-1]}, or use --method nested",
        )
    if method.needs_calibration and options.calibration is None:
        yield UsageError(
            f"method {method.name} needs calibration text at preset {options.preset!r}",
            hint="give --calibration FILE (or the built-in text `stdlib`), or use --preset fast",
        )


def _devices(value: object, device: object) -> tuple[torch.device, ...]:
    """One or several devices, of one kind; none where none are given."""
    if value is None:
        return ()
    if device != "auto":
        raise UsageError("--device and --devices were both given", hint="--devices alone names all of them")
    given = value.split(",") if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [value]
    names = [str(name).strip() for name in given if str(name).strip()]
    shown, hint = f"--devices {','.join(names)}", "such as cuda:0,cuda:1, or cpu,cpu"
    if not names:
        raise UsageError("--devices names no device", hint=hint)
    kinds = {name.partition(":")[0] for name in names}
    if kinds == {"cpu", "cuda"}:
        raise UsageError(f"{shown}: CPUs and GPUs do not make the same numbers, so they share no job", hint=hint)
    if kinds == {"cuda"} and len(names) > 1:
        for place, name in enumerate(names):
            if name == "cuda":
                raise UsageError(f"{shown}: {name} does not say which GPU", hint=hint)
            if name in names[:place]:
                raise UsageError(f"{shown}: {name} is there twice", hint="each process needs a GPU of its own")
    check_size(len(names))
    return tuple(map(pick_device, names))


def _dtype(value: object, method: Method, device: torch.device) -> torch.dtype:
    """What products are made in. Methods without moments differentiate, or need no products, so they are exact."""
    if value not in DTYPES:
        raise UsageError(
            f"--dtype must be one of {', '.join(DTYPES)}, got {arguments.shown(value)}", hint="the default is auto"
        )
    if not isinstance(method, MomentsMethod) or not method.needs:
        return torch.float32
    half = half_products(device) if value == "auto" else value == "bfloat16"
    return torch.bfloat16 if half else torch.float32


def _head_bits(value: object) -> int | None:
    if value is None:
        return None
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
