"""vLLM's linear layers, multiplied by planes: column and row parallel, joined, replicated."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase

from ...errors import UsageError
from . import product
from .parameters import Part, add_guard, add_parameters, take_weights
from .rows import LayerRows
from .stored import Stored
from .words import with_hints


class PlaneLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """y = x @ W_bits^T + bias of one layer.

    Args:
        stored: whose output features, joined, are those of the layer.
        rows: of each of the joined layers. A plan may give them different bits.
        draft: what a draft model is called, which gets the weights of another one (speculation.py).
    """

    def __init__(self, stored: Stored, rows: Sequence[LayerRows], draft: str = "") -> None:
        self.stored, self.rows, self.draft = stored, rows, draft

    @with_hints()
    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Parameters for the part of the layer that this worker holds; UsageError where it cannot be cut so."""
        stored, columns, rows = self.stored, input_size_per_partition, sum(output_partition_sizes)
        joined = len(stored.names) > 1
        fits = not joined or (
            len(stored.outputs) == len(output_partition_sizes)
            and all(whole % part == 0 for whole, part in zip(stored.outputs, output_partition_sizes, strict=True))
        )
        if input_size != stored.in_features or not fits or (not joined and stored.outputs[0] % rows):
            raise UsageError(
                f"{stored.title}: the checkpoint has {list(stored.outputs)} x {stored.in_features} weights, vLLM's "
                f"layer {output_partition_sizes} x {input_size} on each worker"
            )
        stored.check_cut(columns, input_size // columns)
        self.columns, self.dtype = columns, params_dtype
        self.sizes = output_partition_sizes if joined else [rows]
        if not self.draft:
            add_parameters(layer, stored, rows, columns, attributes["weight_loader"])
        add_guard(layer, params_dtype)
        layer.product_key = product.hold_place(f"bitstrata:{self.draft}{stored.title}", layer)
        layer.product_rows = rows

    @with_hints()
    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack what was loaded for the kernel that runs here."""
        if hasattr(layer, "product"):
            return
        runs = [
            (rows, sum(size for size, _ in run))
            for rows, run in groupby(zip(self.sizes, self.rows, strict=True), lambda part: part[1])
        ]
        parts = [Part(size, rows.needed) for rows, size in runs]
        weights = take_weights(layer, self.stored, self.columns, self.dtype, parts)
        layer.product = product.Product([(weight, rows) for weight, (rows, _) in zip(weights, runs, strict=True)])

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N], the part of this worker."""
        y = product.linear(layer, x)
        return y if bias is None else y + bias
