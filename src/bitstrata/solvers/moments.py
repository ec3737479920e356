"""Second moments of what a linear reads.

A linear sees at p bits the inputs X_p that the model quantized so far produces, and should give
there what the original gives on its own inputs X. With n tokens as rows,

    || X_p Q^T - X W^T ||^2 / n = || (Q - W*) H^{1/2} ||^2 + const,
    H = X_p^T X_p / n,   C = X^T X_p / n,   W* = W C H^-1

so a solver needs H and the corrected target W* (asymmetric calibration; GPTAQ, arXiv 2504.02692).
H is damped; with damping d, C is damped alike, so that W* = W where the two chains agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """hessian H and cross C, fp32 [K, K], of `tokens` inputs of width K, not damped."""

    hessian: Tensor
    cross: Tensor
    tokens: int

    def damping(self, share: float) -> float:
        """`share` of the mean of H's diagonal; 1 if nothing ever reached the layer."""
        mean = float(self.hessian.diagonal().mean())
        return share * mean if mean > 0 else 1.0

    def damped(self, share: float) -> Tensor:
        """H + d I, fp32 [K, K]; positive definite for share > 0."""
        return self.hessian + self.damping(share) * torch.eye(len(self.hessian), device=self.hessian.device)

    def target(self, weight: Tensor, share: float, correction: float) -> Tensor:
        """W + correction (W C H^-1 - W), with H and C damped: fp32 [N, K]."""
        if not correction:
            return weight
        change = weight.double() @ (self.cross - self.hessian).double()
        factor, _ = torch.linalg.cholesky_ex(self.damped(share).double())
        return weight + correction * torch.cholesky_solve(change.T, factor).T.to(weight.dtype)

    def alive(self, weight: Tensor) -> Tensor:
        """`weight` [N, K] with 0 in columns whose inputs were always 0."""
        return weight.masked_fill((self.hessian.diagonal() <= 0).to(weight.device), 0)
