"""The instruction sets of this build, and the kernels whose code differs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bitstrata.kernels import Weight, linear_many, pack, registry
from bitstrata.kernels.cpu.extension import native
from bitstrata.planes import PlaneWeight

SETS = native.instruction_sets() if native is not None else []  # (name, runs here, why not), best first
ISAS = [name for name, runs, _ in SETS if runs]
BEST = ISAS[0] if ISAS else ""


@dataclass(frozen=True)
class Forced:
    """The kernel of an instruction set, in one of its variants; weights are packed for it."""

    isa: str
    variant: str

    @property
    def name(self) -> str:
        return f"{self.isa}-{self.variant}" if self.variant else self.isa

    def __getattr__(self, name: str) -> Any:
        return getattr(registry._KERNELS[self.name], name)

    def pack(self, weight: PlaneWeight | Weight) -> Weight:
        return pack(weight.stored() if isinstance(weight, Weight) else weight, kernel=self.name)

    def linear(self, x: Tensor, weight: PlaneWeight | Weight, bits: int | Tensor) -> Tensor:
        return self.pack(weight).linear(x, bits)

    def linear_many(self, x: Tensor, weights: list[Any], bits: int | Tensor) -> list[Tensor]:
        return linear_many(x, [self.pack(weight) for weight in weights], bits)


def kernel_of(isa: str, variant: str = "") -> Forced:
    """The kernel of an instruction set: variant "", "int8" or "exact"."""
    return Forced(isa, variant)


# An instruction set's plain kernel is its -int8 one; all -exact kernels compile the same loops.
# test_instruction_sets.py compares those that are left out with these.
DISTINCT = ["reference", *(f"{isa}-int8" for isa in ISAS), *([f"{BEST}-exact"] if BEST else [])]
