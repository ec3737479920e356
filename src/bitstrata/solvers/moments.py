"""Second moments of what linears read, and the methods that solve one linear at a time with them.

A linear sees at p bits the inputs X_p that the model quantized so far produces, and should give
there what the original gives on its own inputs X. With n tokens as rows,

    || X_p Q^T - X W^T ||^2 / n = || (Q - W*) H^{1/2} ||^2 + const,
    H = X_p^T X_p / n,   C = X^T X_p / n,   W* = W C H^-1

so a solver needs H and the corrected target W* (asymmetric calibration; GPTAQ, arXiv 2504.02692).
H is damped; with damping d, C is damped alike, so that W* = W where the two chains agree.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..planes import PlaneWeight, decode
from .grouping import check_weight
from .method import Block, Method, Need

ROWS_AT_ONCE = 4096  # rows that a solver holds


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


@dataclass(frozen=True)
class MomentsMethod(Method):
    """Solves the linears of a block in the order in which they run, each on the inputs that the solved ones give it."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"inputs"})

    def memory(self, shapes: Sequence[tuple[int, int]], bits: tuple[int, ...], seq_len: int) -> int:
        """Hessian, cross moments, the damped one and its factor a precision, two in float64; the solver's tensors."""
        if not self.needs:
            return 0
        return max(
            4 * columns * (columns * (4 * len(bits) + 4) + min(rows, ROWS_AT_ONCE) * (4 * len(bits) + 6))
            for rows, columns in shapes
        )

    @abstractmethod
    def solve(self, weight: Tensor, found: Mapping[int, Moments], group_size: int) -> PlaneWeight:
        """W fp32 [N, K], checked, and the moments of its inputs at each bits -> planes and scales."""

    def solve_block(self, block: Block) -> dict[str, PlaneWeight]:
        if not self.needs:
            return super().solve_block(block)
        solved: dict[int, dict[str, Tensor]] = {bits: {} for bits in block.bits}
        result = {}
        for names in block.input_groups():
            found = block.moments(names, solved)
            tokens = found[max(found)].tokens
            for name in names:
                weight = block.weights[name].float()
                check_weight(name, weight)
                if tokens < weight.shape[1]:
                    block.say(
                        f"{name}: {tokens} calibration tokens for {weight.shape[1]} inputs; "
                        "damping fills in, more tokens would be better"
                    )
                result[name] = self.solve(weight, found, block.group_size)
                for bits in block.bits:
                    solved[bits][name] = decode(result[name], bits).to(weight.device)
        return {name: result[name] for name in block.weights}
