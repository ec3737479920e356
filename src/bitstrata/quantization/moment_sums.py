"""H and C of what a linear reads at one precision, summed batch by batch (solvers/moments.py says what they are for).

Summed are H = X_p^T X_p and the drift D = (X - X_p)^T X_p; C = H + D. Solvers use C - H, and what a product in bf16
rounds is then small against D itself, and not only against H. Of H, which is symmetric, blocks of columns are computed
down to the diagonal only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..calibration.lanes import EVERYTHING, LaneSum, Share
from ..kernels.cpu import add_gram
from ..solvers import Moments

PANEL = 384  # columns of H computed at a time


class MomentSums:
    """Sums over the batches of lanes: `add` each batch, `end_lane` after each lane.

    share: which lanes these are; the result is that of all. On a CPU with instructions for it, products of bf16 are
    summed in fp32 in native code.
    """

    def __init__(self, columns: int, device: torch.device, share: Share = EVERYTHING) -> None:
        self._hessian = LaneSum((columns, columns), device, share)
        self._drift = LaneSum((columns, columns), device, share)
        self._share = share
        self._tokens = 0

    def add(self, original: Tensor, quantized: Tensor) -> None:
        """Inputs [n, K] of the original and of the quantized chain, in the dtype of the products."""
        hessian, drift = self._hessian.current, self._drift.current
        apart = original - quantized
        if add_gram(drift, apart, quantized):
            add_gram(hessian, quantized, quantized, upper=True)
        else:  # all sums in fp32: of products rounded to bf16, H would no longer be positive
            one = quantized.float()
            drift.addmm_(apart.float().T, one)
            for start in range(0, len(hessian), PANEL):
                end = min(start + PANEL, len(hessian))
                hessian[:end, start:end].addmm_(one[:, :end].T, one[:, start:end])
        self._tokens += len(original)

    def end_lane(self) -> None:
        self._hessian.end_lane()
        self._drift.end_lane()

    def result(self) -> Moments:
        """Both over the number of tokens, fp32 [K, K]."""
        tokens = self._share.counted(self._tokens)
        hessian, cross = self._hessian.result().div_(tokens), self._drift.result().div_(tokens)
        hessian.triu_()
        hessian.add_(hessian.T.tril(-1))
        cross.add_(hessian)
        return Moments(hessian, cross, tokens)
