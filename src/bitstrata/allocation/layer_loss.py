"""The Hessian layer loss of each layer at each bits, in one pass over a text.

    E(l, b) = tr(dW H dW^T) / tr(W H W^T),   dW = W_b - W_max,   H = X^T X / n

H is never formed: tr(dW H dW^T) = |X dW^T|^2 / n, summed in a hook while the model runs at its highest
bits, so memory is one decoded weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..nn import PlaneLinear, bits_state, use_bits
from ..planes import decode

TOKENS_PER_BATCH = 8192  # every batch decodes every weight once


@torch.no_grad()
def layer_losses(model: PreTrainedModel, windows: Tensor) -> dict[str, dict[int, float]]:
    """Layer -> bits -> E(l, b) on `windows`, int64 [n, S]; 0 at the highest bits of the model."""
    state = bits_state(model)
    base = max(state.supported)
    layers = {
        module.name: module
        for module in model.modules()
        if isinstance(module, PlaneLinear) and module.name in state.layers
    }
    sums = {name: dict.fromkeys(layer.bits, 0.0) for name, layer in layers.items()}
    whole = dict.fromkeys(layers, 0.0)

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0].reshape(-1, arguments[0].shape[-1]).float()
            stored = layers[name].plane_weight()
            reference = decode(stored, base).float()
            whole[name] += float((x @ reference.T).square().sum(dtype=torch.float64))
            for bits in sums[name]:
                if bits != base:
                    change = decode(stored, bits).float() - reference
                    sums[name][bits] += float((x @ change.T).square().sum(dtype=torch.float64))

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        with use_bits(model, base):
            for batch in windows.to(model.device).split(max(1, TOKENS_PER_BATCH // windows.shape[1])):
                model(input_ids=batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: {bits: value / whole[name] if whole[name] else 0.0 for bits, value in of.items()}
        for name, of in sums.items()
    }
