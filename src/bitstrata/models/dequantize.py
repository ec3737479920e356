"""`model.dequantize()`: the model at the bits it runs at, as an ordinary one of transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UsageError
from ..nn import Experts, PlaneEmbedding, PlaneLinear, StoredExperts, TiedHead, bits_state
from ..planes import decode
from .compat import tie
from .discover import set_submodule

EXPORT = "write them with `bitstrata export OUT --format dense`, and load that"


def dequantize_in_place(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """Put plain linears and embeddings with the decoded weights in the places of planes; a layer at a time.

    dtype: of the weights; the model's own by default. What then runs is the same, but for kernels' rounding.

    Raises UsageError for a model with experts in planes, and for embeddings that do more than look rows up.
    """
    for name, module in model.named_modules():
        if isinstance(module, (Experts, StoredExperts)):
            raise UsageError(f"{name} holds experts, which are not dequantized in place", hint=EXPORT)
        if isinstance(module, PlaneEmbedding) and module.scale is not None:
            raise UsageError(f"{name} scales its rows, and is not dequantized in place", hint=EXPORT)
    state, dtype = bits_state(model), dtype or model.dtype
    value = state.resolve(state.value).given
    embeddings: dict[PlaneEmbedding, tuple[str, nn.Embedding]] = {}
    with torch.no_grad():
        for name, module in list(model.named_modules()):
            if isinstance(module, PlaneLinear):
                running = value if isinstance(value, int) else value.get(module.name)
                bits = module.bits[0] if len(module.bits) == 1 else running
                assert bits is not None
                weight = decode(module.plane_weight(), bits).to(dtype)
                set_submodule(model, name, _linear(weight, module.bias))
            elif isinstance(module, PlaneEmbedding):
                weight = decode(module.plane_weight(), module.bits[0]).to(dtype)
                embedding = nn.Embedding.from_pretrained(weight, padding_idx=module.padding_idx)
                embeddings[module] = name, embedding
                set_submodule(model, name, embedding)
        for name, module in list(model.named_modules()):
            if isinstance(module, TiedHead):
                source, embedding = embeddings[module.embedding]
                set_submodule(model, name, _linear(embedding.weight, module.bias))
                tie(model, f"{name}.weight", f"{source}.weight")
    return model


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """With this weight [N, K], which is not copied."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return made
