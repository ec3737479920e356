"""The Hessian layer loss of each layer at each bits, in one pass over a text.

    E(l, b) = tr(dW H dW^T) / tr(W H W^T),   dW = W_b - W_max,   H = X^T X / n

H is never formed: tr(dW H dW^T) = |X dW^T|^2 / n, summed in a hook while the model runs at its highest
bits, so memory is one decoded weight.

The experts of one projection count as one layer, tr(W H W^T) that of all of them, each with the tokens that the router
gives it: one that few tokens reach costs little at any bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..nn import Experts, PlaneLinear, bits_state, use_bits
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
    rows = dict.fromkeys(layers, 0)
    routing = _Routing(model)

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0].reshape(-1, arguments[0].shape[-1]).float()
            rows[name] += len(x)
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
        for handle in [*handles, *routing.handles]:
            handle.remove()
    # of an expert, what its tokens are among the rows that it ran on
    part = {name: routing.tokens(name) / rows[name] if rows[name] else 0.0 for name in routing.home}
    total: dict[str, float] = {}
    for name, value in whole.items():
        home = routing.home.get(name, name)
        total[home] = total.get(home, 0.0) + part.get(name, 1.0) * value
    losses = {}
    for name, of in sums.items():
        scale = part.get(name, 1.0) / max(total[routing.home.get(name, name)], 1e-30)
        losses[name] = {bits: scale * value for bits, value in of.items()}
    return losses


class _Routing:
    """How many tokens each expert gets while a model runs; `home`: an expert's linear -> its projection's name."""

    def __init__(self, model: nn.Module) -> None:
        self.handles: list[Any] = []
        self.home: dict[str, str] = {}
        self._place: dict[str, tuple[Tensor, int]] = {}
        for around, module in model.named_modules():
            if not isinstance(module, Experts):
                continue
            counts = torch.zeros(module.expert_count, dtype=torch.int64)
            for expert in range(module.expert_count):
                for projection in module.projections:
                    linear = module.get_submodule(f"{expert}.{projection}")
                    if isinstance(linear, PlaneLinear):
                        self._place[linear.name] = counts, expert
                        self.home[linear.name] = f"{around}.{projection}"

            def count(experts: nn.Module, arguments: tuple[Any, ...], counts: Tensor = counts) -> None:
                assert isinstance(experts, Experts)
                counts.add_(experts.tokens_of(*arguments).cpu())

            self.handles.append(module.register_forward_pre_hook(count))

    def tokens(self, name: str) -> int:
        counts, expert = self._place[name]
        return int(counts[expert])
