"""Budgets, and exactly how many bytes a plan is.

Three numbers, which must not be mixed up:

    weights   what the planned layers hold in memory: of each, planes 0..b-1 and the scales for b bits
    total     what the whole model holds: those, the layers with one precision, and every unquantized
              tensor in the dtype it is loaded with
    bpw       bits that one token reads for each quantized weight, scales included: the planned layers, and
              an output head in planes. The column "bpw read" of `inspect` and `eval`

A budget in bytes limits the total, one in bpw the bits read. Both count stored bytes: a kernel's own
layout may pad small matrices.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod

import torch

from ..checkpoint import CheckpointReader
from ..checkpoint.schema import SAFETENSORS_DTYPES
from ..errors import UsageError
from ..progress import note

_PREFIXES = ("", "k", "m", "g", "t")
UNITS = {f"{p}b": 1000**i for i, p in enumerate(_PREFIXES)} | {f"{p}ib": 1024**i for i, p in enumerate(_PREFIXES) if p}


@dataclass(frozen=True)
class Budget:
    """`amount` bytes in total, or bits read for each quantized weight; `text` is what it is called."""

    amount: float
    unit: str  # "bytes" or "bpw"
    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def exact(self) -> str:
        """The amount as `parse_budget` reads it, whatever `text` says."""
        return f"{self.amount:.12g}bpw" if self.unit == "bpw" else f"{self.amount / 1e6:.12g}MB"


def parse_budget(text: str | Budget) -> Budget:
    """`3.2bpw`, `600MB` (10^6 bytes), `1.8GiB` (2^30 bytes) and the like. Raises UsageError for anything else."""
    if isinstance(text, Budget):
        return text
    hint = "give bits per weight (3.2bpw) or bytes with a unit: 600MB (millions of bytes), 1.8GiB (2^30 bytes)"
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*)\s*", str(text).lower())
    if found is None:
        raise UsageError(f"the budget {text!r} cannot be used", hint=hint)
    amount, unit = float(found[1]), found[2]
    if unit not in UNITS and unit != "bpw":
        raise UsageError(f"the budget {text!r} has {'no unit' if not unit else f'an unknown unit {unit!r}'}", hint=hint)
    if not 0 < amount < float("inf"):
        raise UsageError(f"the budget {text!r} must be above zero and finite", hint=hint)
    return Budget(amount, "bpw", str(text)) if unit == "bpw" else Budget(amount * UNITS[unit], "bytes", str(text))


def bytes_text(count: float) -> str:
    """A count of bytes for people, in powers of ten: `1.80 GB`."""
    step = next((i for i in (4, 3, 2, 1) if count >= 1000**i), 0)
    return f"{count / 1000**step:.2f} {_PREFIXES[step].replace('m', 'M').replace('g', 'G').replace('t', 'T')}B"


@dataclass(frozen=True)
class PlanBytes:
    """What a plan holds: `weights` of the planned layers, `fixed` of everything else, both in bytes; see above."""

    weights: int
    fixed: int
    bpw: float

    @property
    def total(self) -> int:
        return self.weights + self.fixed

    def __str__(self) -> str:
        return (
            f"{bytes_text(self.total)} = {bytes_text(self.weights)} in the planned layers + "
            f"{bytes_text(self.fixed)} fixed; {self.bpw:.3f} bits read a weight"
        )


@dataclass(frozen=True)
class ModelSizes:
    """Every number that a plan's bytes are made of.

    layers: planned layer -> bits -> bytes.
    fixed: bytes that any plan holds besides: layers with one precision, and unquantized tensors.
    fixed_read: of the former, what each token reads.
    weight_count: weights that bpw is about.
    """

    layers: Mapping[str, Mapping[int, int]]
    fixed: int
    fixed_read: int
    weight_count: int

    @classmethod
    def of(cls, reader: CheckpointReader, dtype: torch.dtype | None = None) -> ModelSizes:
        """Those of a checkpoint whose floating-point tensors are loaded as `dtype` (as in `load`: the stored one)."""
        spec = reader.spec
        dtype = dtype or _config_dtype(reader)
        fixed = sum(map(spec.layer_bytes, spec.whole_layers))
        for name in reader.common_names():
            kind, shape = reader.tensor_spec(name)
            stored = SAFETENSORS_DTYPES[kind]
            fixed += prod(shape) * (dtype if stored.is_floating_point else stored).itemsize
        layers = {
            name: {bits: spec.prefix_bytes(name, bits) for bits in spec.layer_bits(name)}
            for name in spec.planned_layers
        }
        return cls(layers, fixed, spec.fixed_bytes_read, spec.weight_count)

    @property
    def smallest(self) -> dict[str, int]:
        """The plan with every layer at its lowest bits."""
        return {name: min(sizes) for name, sizes in self.layers.items()}

    @property
    def largest(self) -> dict[str, int]:
        """The plan with every layer at its highest bits."""
        return {name: max(sizes) for name, sizes in self.layers.items()}

    def of_plan(self, plan: Mapping[str, int]) -> PlanBytes:
        """The bytes of a plan that fits (`Plan.check`)."""
        weights = sum(sizes[plan[name]] for name, sizes in self.layers.items())
        return PlanBytes(weights, self.fixed, 8 * (weights + self.fixed_read) / self.weight_count)

    def limit(self, budget: str | Budget) -> int:
        """The most bytes that the planned layers may have. Raises UsageError if not even the smallest plan fits."""
        budget = parse_budget(budget)
        if budget.unit == "bytes":
            limit = int(budget.amount) - self.fixed
        else:
            limit = int(budget.amount * self.weight_count / 8 + 1e-6) - self.fixed_read  # 3.25bpw means 3.25, not less
        least = self.of_plan(self.smallest)
        if limit < least.weights:
            enough = f"{_ceil(least.total / 1000)}MB" if budget.unit == "bytes" else f"{_ceil(1000 * least.bpw)}bpw"
            raise UsageError(
                f"the budget {budget} is below the smallest this model can be: "
                f"{least.total} bytes ({bytes_text(least.total)}), {least.bpw:.3f}bpw",
                hint=f"{least.fixed} of those bytes are not in planned layers; give at least {enough}",
            )
        return limit

    def note_excess(self, budget: str | Budget) -> None:
        """Say so where a budget is above the largest plan. Raises UsageError as `limit` does."""
        largest = self.of_plan(self.largest)
        if self.limit(budget) > largest.weights:
            note(
                f"the budget {budget} is above the whole model, {bytes_text(largest.total)} or {largest.bpw:.3f}bpw: "
                "every layer has its highest bits"
            )


def _ceil(thousandths: float) -> str:
    """A number of thousandths, rounded up to a whole one, as a decimal."""
    return f"{ceil(thousandths) / 1000:.3f}"


def _config_dtype(reader: CheckpointReader) -> torch.dtype:
    """What transformers loads floating-point tensors as, by default."""
    name = str(reader.config.get("dtype") or reader.config.get("torch_dtype") or "float32").removeprefix("torch.")
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else torch.float32
