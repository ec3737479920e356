"""The output head and the token embedding as planes: `--head-bits`.

They are quantized first, from their weights alone and a stretch of rows at a time, and made durable
like a block. The chains of hidden states at each bits, and those of round-to-nearest, then start
from the quantized embedding, so methods that learn make up for it, and the final check ends in the
quantized head.

Per group, at p bits:

    grid     round-to-nearest with both ends drawn in by the factor, out of SHRINKS, of least squared error
    refine   ROUNDS alternations from there as in bcq.py: fit offset and scales, assign the nearest codes
    choose   the one of the two with the smaller error as it is stored

Starting from an even grid matters above 4 bits: from a greedy start the alternation ends in a worse
optimum than plain round-to-nearest. Measured figures are in docs/log.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models import HeadLayer
from ..planes import PlaneWeight, decode
from ..planes.weights import SCALE_DTYPE
from ..progress import Reporter
from .bcq import Solution, assign, fit, objective
from .grouping import Grouping, affine_weight, join_rows, row_chunks, to_scale
from .preflight import Prepared
from .state import JobState

ROUNDS = 5
SHRINKS = 20
LEAST_SHRINK = 0.5
CHUNK = 1 << 20  # weights solved at a time


def solve_rows(weight: Tensor, bits: int, group_size: int) -> PlaneWeight:
    """Rows W fp32 [n, K] as planes with affine scales, for `bits`."""
    grouping = Grouping.of(weight, group_size)
    w, d = grouping.split(weight), grouping.mask(weight.device)
    start = clipped_grid(w, d, bits)
    planes, scale, offset = start
    for _ in range(ROUNDS):
        scale, offset = fit(w, d, planes, scale, offset)
        scale = scale.abs().sort(dim=0, descending=True).values
        planes = assign(w, scale, offset)
    scale, offset = fit(w, d, planes, scale, offset)
    scale, offset = to_scale(scale).float(), to_scale(offset).float()
    better = objective(w, d, planes, scale, offset) < objective(w, d, *start)
    planes = torch.where(better.unsqueeze(1), planes, start[0])
    coefficients = torch.where(better, scale, start[1]), torch.where(better, offset, start[2])
    return affine_weight(grouping, planes > 0, {bits: coefficients})


def clipped_grid(w: Tensor, d: Tensor, bits: int) -> Solution:
    """For groups w [R, g] with mask d: even levels between the ends drawn in as far as is best; scales as stored."""
    real = d > 0
    low = w.masked_fill(~real, torch.inf).amin(1, keepdim=True)
    high = w.masked_fill(~real, -torch.inf).amax(1, keepdim=True)
    levels = 2**bits - 1
    middle = to_scale((high + low) / 2).float()
    best_error = torch.full_like(middle, torch.inf)
    best_half = torch.zeros_like(middle)
    best_code = torch.zeros_like(w)
    for step in range(SHRINKS):
        share = 1 - step * (1 - LEAST_SHRINK) / SHRINKS
        # the stored half-step is what the codes are rounded to, so round it before it is used
        half = ((high - low) * share / levels / 2).to(SCALE_DTYPE).float()
        start = middle - half * levels
        code = torch.where(half > 0, (w - start) / (2 * half), 0.0).round().clamp(0, levels)
        error = (d * (start + 2 * half * code - w).square()).sum(1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_half = torch.where(better, half, best_half)
        best_code = torch.where(better, code, best_code)
    whole = best_code.int()
    planes = torch.stack([((whole >> (bits - 1 - index)) & 1).to(w.dtype) * 2 - 1 for index in range(bits)])
    scale = torch.stack([to_scale(best_half[:, 0] * 2 ** (bits - 1 - index)).float() for index in range(bits)])
    return planes, scale, middle[:, 0]


class HeadPlanes:
    """The head and the embedding of one job; does nothing where `--head-bits` was not given."""

    def __init__(self, prepared: Prepared, state: JobState, reporter: Reporter) -> None:
        self.prepared, self.state, self.reporter = prepared, state, reporter
        self.settings = prepared.settings
        self.layer_error: dict[str, dict[str, float]] = {}

    def run(self) -> None:
        """Quantize what no earlier run has made durable, and measure all of it."""
        for layer in self.prepared.head:
            if self.state.has(layer.role):
                self.reporter.say(f"resuming: {layer.name} is already done")
            else:
                self.reporter.say(f"quantizing {layer.name} at {self._bits} bits")
                self.state.save(layer.role, {layer.name: self._solve(layer)})
            self.layer_error[layer.name] = {str(self._bits): self._error(layer)}

    @property
    def _bits(self) -> int:
        assert self.settings.head_bits is not None
        return self.settings.head_bits

    def embedding(self) -> dict[str, Tensor]:
        """Parameter name -> decoded weight, fp32, of the embedding; empty without `--head-bits`."""
        return {
            f"{layer.name}.weight": self._decoded(layer) for layer in self.prepared.head if layer.role == "embedding"
        }

    def output(self) -> dict[str, Tensor]:
        """The same of the output head."""
        return {
            f"{layer.tied or layer.name}.weight": self._decoded(layer)
            for layer in self.prepared.head
            if layer.tied is not None or layer.role == "head"
        }

    def _decoded(self, layer: HeadLayer) -> Tensor:
        return decode(self.state.load(layer.role, [layer.name])[layer.name], self._bits)

    def _rows(self, layer: HeadLayer, rows: slice) -> Tensor:
        stored = self.prepared.source.stored_name(f"{layer.name}.weight")
        assert stored is not None
        return self.prepared.source.rows(stored, rows.start, rows.stop).to(self.settings.device).float()

    def _solve(self, layer: HeadLayer) -> PlaneWeight:
        parts = []
        for rows in row_chunks(layer.out_features, layer.in_features, CHUNK):
            parts.append(solve_rows(self._rows(layer, rows), self._bits, self.settings.group_size))
        return join_rows(parts)

    def _error(self, layer: HeadLayer) -> float:
        """||W - W_bits||^2 / ||W||^2."""
        planes = self.state.load(layer.role, [layer.name])[layer.name]
        wrong = total = 0.0
        for rows in row_chunks(layer.out_features, layer.in_features, CHUNK):
            weight = self._rows(layer, rows).cpu()
            dense = decode(planes.outputs(rows.start, rows.stop), self._bits)
            wrong += float((dense - weight).square().sum(dtype=torch.float64))
            total += float(weight.square().sum(dtype=torch.float64))
        return wrong / max(total, 1e-30)
