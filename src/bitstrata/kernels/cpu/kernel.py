"""The CPU kernels as the registry knows them: one for each instruction set, in three variants.

    <isa>         int8 activations and byte levels, in 16-bit dtypes whatever the number of rows; in float32 more than
                  FEW_ROWS as `-exact`, since who computes in float32 wants its digits
    <isa>-int8    int8 activations and byte levels, whatever the number of rows and the dtype
    <isa>-exact   activations and weights as they are: up to FEW_ROWS rows from the planes in float32, more rows
                  through tiles of the decoded weight and the platform's matrix product

The variants only run when they are forced.
"""

from __future__ import annotations

from functools import partial

import torch

from ..registry import Kernel
from .blocked import FEW_ROWS, TYPES, BlockedWeight
from .extension import native


def cpu_kernels() -> list[Kernel]:
    """Every kernel of the native extension, whether this processor can run it or not."""
    if native is None:
        return []
    sets = native.instruction_sets()
    kernels = []
    for index, (isa, runs, needs) in enumerate(sets):
        reason = partial(_reason, None if runs else f"this processor lacks {needs}")
        for suffix, priority, activations, steady_rows in (
            ("", 10 * (len(sets) - index), "int8", FEW_ROWS),
            ("-int8", -1, "int8", None),
            ("-exact", -1, "exact", FEW_ROWS),
        ):
            name, layout = isa + suffix, BlockedWeight.layout
            dtypes = frozenset({torch.float32}) if activations == "int8" else None
            kernels.append(Kernel(name, layout, priority, activations, steady_rows, reason, steady_dtypes=dtypes))
    return kernels


def _reason(lacking: str | None, device: str, dtype: torch.dtype, forced: bool) -> str | None:
    if device != "cpu":
        return f"tensors are on {device}"
    if lacking is None and dtype not in TYPES:
        return f"activations are {dtype}; float32, float16 and bfloat16 can be used"
    return lacking
