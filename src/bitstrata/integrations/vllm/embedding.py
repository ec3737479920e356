"""vLLM's token embedding and output head from planes; a tied head multiplies by the embedding's, kept once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from ...errors import UsageError
from . import product
from .parameters import Part, add_guard, add_parameters, take_weights
from .stored import Stored
from .words import with_hints


class PlaneVocabularyMethod(QuantizeMethodBase):  # type: ignore[misc]
    """An embedding or a head, [tokens, K], at the one precision that it has. Tensor parallelism cuts the tokens.

    Args:
        stored: None for a head that reads the planes of the embedding, and for a draft, which gets all from the model
            that it drafts for (speculation.py).
    """

    def __init__(self, stored: Stored | None) -> None:
        self.stored = stored

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
        """Parameters for the tokens that this worker holds; UsageError if the vocabulary is not the checkpoint's."""
        self.columns, self.dtype = input_size, params_dtype
        add_guard(layer, params_dtype)
        if self.stored is None:
            return
        stored, rows = self.stored, sum(output_partition_sizes)
        if input_size != stored.in_features or layer.org_vocab_size != stored.outputs[0]:
            raise UsageError(
                f"{stored.title}: the checkpoint has {stored.outputs[0]} tokens x {stored.in_features}, the model "
                f"{layer.org_vocab_size} x {input_size}"
            )

        def load(parameter: nn.Parameter, loaded: Tensor) -> None:
            """The worker's tokens, and zeros for those that fill up the vocabulary."""
            dim, places = parameter.output_dim, layer.shard_indices  # type: ignore[attr-defined]
            first, count = places.org_vocab_start_index, places.num_org_elements
            parameter.data.zero_()
            parameter.data.narrow(dim, 0, count).copy_(loaded.narrow(dim, first, count))

        add_parameters(layer, stored, rows, input_size, load)
        layer.product_key = product.hold_place(f"bitstrata:{stored.title}", layer)
        layer.product_rows = rows

    @with_hints()
    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack what was loaded for the kernel that runs here."""
        if self.stored is not None and not hasattr(layer, "product"):
            whole = [Part(layer.product_rows, self.stored.bits)]
            (weight,) = take_weights(layer, self.stored, self.columns, self.dtype, whole)
            layer.product = product.Product([(weight, None)])

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        """ids [...] of this worker's tokens -> [..., K]."""
        return product.lookup(layer, ids, self.columns, self.dtype)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> logits [..., tokens], the part of this worker."""
        y = product.linear(getattr(layer, "planes_of", layer), x)
        return y if bias is None else y + bias

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Let the head `layer` multiply by the planes of `embed_tokens`."""
        layer.__dict__["planes_of"] = embed_tokens  # no submodule: its planes are loaded and counted once
        return layer
