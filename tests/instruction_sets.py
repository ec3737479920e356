"""The instruction sets of this build, and the kernels whose code differs."""

from __future__ import annotations

from typing import Any

from bitstrata.kernels import registry
from bitstrata.kernels.cpu.extension import native

SETS = native.instruction_sets() if native is not None else []  # (name, runs here, why not), best first
ISAS = [name for name, runs, _ in SETS if runs]
BEST = ISAS[0] if ISAS else ""


def kernel_of(isa: str, variant: str = "") -> Any:
    """The kernel of an instruction set: variant "", "int8" or "exact"."""
    return registry._KERNELS[f"{isa}-{variant}" if variant else isa]


# An instruction set's plain kernel is its -int8 one up to 16 rows and torch's product with decoded tiles beyond; all
# -exact kernels compile the same loops. test_instruction_sets.py compares those that are left out with these.
DISTINCT = ["reference", *(f"{isa}-int8" for isa in ISAS), *([f"{BEST}-exact"] if BEST else [])]
