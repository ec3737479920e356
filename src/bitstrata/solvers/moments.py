"""Second moments of what a linear reads.

A linear sees at p bits the inputs X_p that the model quantized so far produces, and should give
there what the original gives on its own inputs X. With n tokens as rows,

    || X_p Q^T - X W^T ||^2 / n = || (Q - W*) H^{1/2} ||^2 + const,
    H = X_p^T X_p / n,   C = X^T X_p / n,   W* = W C H^-1

so a solver needs H and the corrected target W* (asymmetric calibration; GPTAQ, arXiv 2504.02692).
H is damped; with damping d, C is damped alike, so that W* = W where the two chains agree. Kept is the drift
D = C - H, so W* = W + W D H^-1.

Both are kept as panels of columns, in files where they are large (scratch.py): nothing here needs a whole one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..scratch import Tensors


@dataclass(frozen=True)
class Moments:
    """H and D of `tokens` inputs of width K, not damped, fp32.

    ends: of the columns of each panel; the first begins at 0.
    upper: H[:end, start:end] of each panel; what is below the diagonal of H does not count.
    drift: D[:, start:end] of each panel.
    folder: for files of what is made of them; None for the system's own.
    """

    ends: Sequence[int]
    upper: Tensors
    drift: Tensors
    tokens: int
    folder: Path | None = None

    @classmethod
    def of(cls, hessian: Tensor, cross: Tensor, tokens: int, folder: Path | None = None) -> Moments:
        """From H and C as a whole, fp32 [K, K]."""
        return cls((len(hessian),), [hessian], [cross - hessian], tokens, folder)

    @property
    def columns(self) -> int:
        """K."""
        return self.ends[-1]

    def spans(self) -> Iterator[tuple[int, int]]:
        """The columns of each panel."""
        return zip((0, *self.ends), self.ends, strict=False)

    def symmetric(self) -> Iterator[tuple[int, int, Tensor]]:
        """Of each panel its columns, and H[:end, start:end] with what is below the diagonal too; not to be changed."""
        for (start, end), panel in zip(self.spans(), self.upper, strict=True):
            square = panel[start:end].triu()
            yield start, end, torch.cat([panel[:start], square + square.T.tril(-1)])

    @cached_property
    def diagonal(self) -> Tensor:
        """Of H: [K]."""
        return torch.cat(
            [panel[start:end].diagonal() for (start, end), panel in zip(self.spans(), self.upper, strict=True)]
        )

    @property
    def hessian(self) -> Tensor:
        """H as a whole, [K, K]: for layers that are small."""
        whole = torch.empty(self.columns, self.columns, device=self.diagonal.device)
        for start, end, panel in self.symmetric():
            whole[:end, start:end] = panel
            whole[start:end, :end] = panel.T
        return whole

    @property
    def cross(self) -> Tensor:
        """C as a whole, [K, K]: for layers that are small."""
        return self.hessian + torch.cat(list(self.drift), 1)

    def damping(self, share: float) -> float:
        """`share` of the mean of H's diagonal; 1 if nothing ever reached the layer."""
        mean = float(self.diagonal.mean())
        return share * mean if mean > 0 else 1.0

    def damped(self, share: float) -> Tensor:
        """H + d I as a whole, [K, K]; positive definite for share > 0."""
        hessian = self.hessian
        hessian.diagonal().add_(self.damping(share))
        return hessian

    @property
    def dead(self) -> Tensor:
        """Which inputs were always 0: bool [K]."""
        return self.diagonal <= 0
