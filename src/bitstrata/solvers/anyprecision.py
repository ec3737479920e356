"""Any-Precision: a table of centres for every row and precision, found by nested weighted k-means.

arXiv 2402.10517. Each row of a weight is clustered alone, with the sensitivity of each weight as its
weight in the sums (algorithm 4 of the specification; kmeans.py):

    sensitivity  F = sum over sequences of (d loss / d W)^2, and 0 for weights that are 0; a row
                 without any sensitivity counts every weight the same
    seed         2^p_L centres by k-means at the lowest bits p_L
    upscaling    p -> p + 1: every cluster is split by 2-means into codes 2 c (low) and 2 c + 1; the
                 centres of p stay as the table of p

Where we differ from the published code: its k-means is randomised Lloyd iteration, ours is the
optimum; its splits and sums of squares are approximate in ways that ours are not (fp32 sums, not
bf16). Centres are rounded to fp16 once, at the end; codes do not depend on the rounding.

The tables belong to rows, so the group size has no influence on the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..planes.pack import pack_bits
from ..planes.weights import MAX_BITS, Codebook, Kind, PlaneWeight
from .grouping import check_weight, code_planes, row_chunks, to_scale
from .kmeans import nested_kmeans
from .method import Block, Method, Need

CHUNK = 1 << 15  # weights solved at a time: the working arrays stay in cache


@dataclass(frozen=True)
class AnyPrecision(Method):
    """Nested k-means of each row, weighted by the sensitivity of the loss.

    fisher: weigh errors by squared gradients of the loss, which takes calibration text
        (paper: 100 windows of 512 tokens); else all weights count the same.
    kmeans_bits: the most bits at which k-means is solved at once; where the lowest bits asked for are
        more, clusters are split from here on. Time doubles with each: seconds a layer of 4096 x 4096
        at 3 bits, ten minutes at 8.
    """

    fisher: bool = True
    kmeans_bits: int = MAX_BITS

    name = "anyprecision"
    presets: ClassVar = {"fast": {"fisher": False}}

    def __post_init__(self) -> None:
        if not 1 <= self.kmeans_bits <= MAX_BITS:
            raise ValueError(f"kmeans_bits must lie in 1..{MAX_BITS}")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"gradients"}) if self.fisher else frozenset()

    def scales_kind(self, bits: tuple[int, ...]) -> Kind:
        return "codebook"

    def memory(self, shapes: Sequence[tuple[int, int]], bits: tuple[int, ...], seq_len: int) -> int:
        """The sensitivities of a block, and its weights at one precision."""
        return 8 * sum(rows * columns for rows, columns in shapes) if self.fisher else 0

    def solve_layer(
        self, weight: Tensor, bits: tuple[int, ...], group_size: int, sensitivity: Tensor | None = None
    ) -> PlaneWeight:
        """W [N, K] -> planes and a table for each of `bits`, on the CPU.

        `sensitivity` [N, K] is finite and not negative; None: all weights count the same. Raises
        ModelError for NaN, infinity, or weights beyond the range of fp16.
        """
        check_weight("a weight", weight)
        rows, columns = weight.shape
        codes = np.empty((rows, columns), dtype=np.uint8)
        tables = {value: np.empty((rows, 2**value)) for value in bits}
        for part in row_chunks(rows, columns, CHUNK):
            values = weight[part].double().cpu().numpy()
            weights = np.ones_like(values)
            if sensitivity is not None:
                weights = np.where(values == 0, 0.0, sensitivity[part].double().cpu().numpy())
            codes[part], centres = nested_kmeans(values, weights, bits, self.kmeans_bits)
            for value, centre in centres.items():
                tables[value][part] = centre
        planes = tuple(map(pack_bits, code_planes(torch.from_numpy(codes), bits[-1])))
        scales = {value: Codebook(to_scale(torch.from_numpy(table))) for value, table in tables.items()}
        return PlaneWeight(planes, scales, columns, group_size)

    def solve_block(self, block: Block) -> dict[str, PlaneWeight]:
        sensitivity = block.sensitivity or {}
        return self.solve_apart(
            block,
            lambda name: self.solve_layer(block.weights[name], block.bits, block.group_size, sensitivity.get(name)),
        )
