"""Which type of GGUF each quantized layer gets.

a type asked for   `--type`: as it says
one that holds it  the smallest in which the layer's own codes fit, if it is on a uniform grid: its error is that of
                   fp16 coefficients, at most HELD
with --refit       the usual type for its bits, of which the weight is the nearest one found; an error
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError
from ..planes import PlaneWeight, decode
from .chosen import Chosen
from .ggml import BLOCK_TYPES, BlockType
from .gguf_file import gguf_package
from .result import HELD, distance, relative
from .uniform import grid_of, spread

PLAIN = ("F32", "F16", "BF16")
# bits -> the usual type, and that of rows that no block of 256 divides
USUAL = {
    1: ("Q2_K", "IQ4_NL"), 2: ("Q2_K", "IQ4_NL"), 3: ("Q3_K", "IQ4_NL"), 4: ("Q4_K", "Q5_0"), 5: ("Q5_K", "Q5_1"),
    6: ("Q6_K", "Q8_0"), 7: ("Q8_0", "Q8_0"), 8: ("Q8_0", "Q8_0"),
}  # fmt: skip
SAMPLE = 32  # rows that tell whether a type holds a layer
MORE_BPW = 1.0  # that a type may take beyond the usual one, to hold a layer that may be refitted


@dataclass(frozen=True)
class Asked:
    """The types that a user asks for: GLOB=TYPE for some layers, TYPE for all others."""

    patterns: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, given: str | Sequence[str]) -> Asked:
        """Raises UsageError for a type that cannot be written."""
        patterns = []
        for text in [given] if isinstance(given, str) else given:
            pattern, _, name = str(text).rpartition("=")
            if name.upper() not in (*BLOCK_TYPES, *PLAIN):
                raise UsageError(f"type {text!r} cannot be used", hint=f"one of {', '.join((*BLOCK_TYPES, *PLAIN))}")
            patterns.append((pattern, name.upper()))
        return cls(tuple(patterns))

    def of(self, name: str, *, is_quantized: bool = True) -> str | None:
        """The type asked for; the last pattern that matches holds. A type without a pattern is for quantized layers."""
        found = None
        for pattern, kind in self.patterns:
            if fnmatch.fnmatchcase(name, pattern) if pattern else is_quantized and found is None:
                found = kind
        return found

    def check_used(self, names: Sequence[str]) -> None:
        """Raise UsageError for a pattern that none of `names` matches."""
        for pattern, kind in self.patterns:
            if pattern and not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise UsageError(f"--type {pattern}={kind} matches no layer", hint="names are those of `inspect`")


def encode(kind: str, values: Tensor, weight: PlaneWeight | None = None, bits: int = 0) -> Tensor:
    """values [N, K] as rows of bytes of a type: uint8 [N, bytes]. Of a quantized layer, its planes and bits."""
    if kind in PLAIN:
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        return values.to(dtype).contiguous().view(torch.uint8)
    block = BLOCK_TYPES[kind]
    grid = None if weight is None else grid_of(weight, bits)
    if grid is None or (grid.group_size % block.part and grid.group_size < values.shape[1]):
        return block.quantize(values.float())
    step, low = (spread(part, values.shape[1], grid.group_size).float() for part in (grid.step, grid.low))
    return block.quantize(values.float(), step, low)


def read_back(kind: str, data: Tensor) -> Tensor:
    """What stands in bytes of a type, as the gguf package reads it: fp32 [N, K]."""
    quants, types = gguf_package().quants, gguf_package().GGMLQuantizationType
    return torch.from_numpy(quants.dequantize(data.numpy(), types[kind]))


def choose_types(chosen: Chosen, asked: Asked, *, refit: bool) -> dict[str, str]:
    """Quantized layer -> type. Raises UsageError for layers that no type holds, unless they may be refitted."""
    found: dict[str, str] = {}
    lost: list[tuple[str, str, float]] = []
    for name in chosen.reader.spec.linears:
        weight, bits = chosen.layer(name), chosen.bits[name]
        rows = torch.linspace(0, weight.out_features - 1, min(SAMPLE, weight.out_features)).long()
        sample = weight.take(rows)
        wanted = asked.of(name)
        if wanted is not None:
            _check_divides(name, wanted, weight.in_features)
            found[name] = wanted
            error = _error(wanted, sample, bits)
        else:
            found[name], error = _best(sample, bits, refit=refit)
        if error > HELD and not refit:
            lost.append((name, found[name], error))
    if lost:
        name, kind, error = max(lost, key=lambda one: one[2])
        raise UsageError(
            f"GGUF does not hold {len(lost)} of {len(found)} layers as they are: {name} ({chosen.bits[name]} bits) as "
            f"{kind} would have a relative error of {error:.3f}",
            hint="--refit fits them anew and says what is lost; --type F16 or BF16 rounds them, and is larger",
        )
    return found


def _best(sample: PlaneWeight, bits: int, *, refit: bool) -> tuple[str, float]:
    """The smallest type that holds a layer, or the usual one; and its error on some rows."""
    usual = USUAL[bits][0 if sample.in_features % 256 == 0 else 1]
    if sample.in_features % 32:
        return "F16", _error("F16", sample, bits)
    if grid_of(sample, bits) is not None:
        for kind in BLOCK_TYPES.values():
            larger = kind.bpw - BLOCK_TYPES[usual].bpw > MORE_BPW
            if kind.levels < 2**bits or sample.in_features % kind.values or (refit and larger):
                continue
            error = _error(kind.name, sample, bits)
            if error <= HELD:
                return kind.name, error
    return usual, _error(usual, sample, bits)


def _error(kind: str, sample: PlaneWeight, bits: int) -> float:
    values = decode(sample, bits)
    squares, error = distance(values, read_back(kind, encode(kind, values, sample, bits)))
    return relative(error, squares)


def _check_divides(name: str, kind: str, columns: int) -> None:
    block: BlockType | None = BLOCK_TYPES.get(kind)
    if block is not None and columns % block.values:
        raise UsageError(
            f"{name} has rows of {columns}, which blocks of {block.values} ({kind}) do not divide",
            hint="IQ4_NL, Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 have blocks of 32",
        )
