"""Block reconstruction: train scales and offsets so that a quantized block reproduces the original's output.

    minimise over a, z   mean ( block(x; W_p(a, z)) - block_fp(x_fp) )^2

with the planes frozen (AnyBCQ, section 3.3; algorithm 3.3). The input mixes the two chains element
by element, x = u < input_mix ? x_quantized : x_fp (the QDrop idea). Adam, cosine from the learning
rate to 0. A coefficient is trained in units of its layer's root-mean-square scale, so one learning
rate suits layers of any magnitude.

Masters stay fp32; what counts is the fp16 they are rounded to. Training is kept only if the rounded
result lowers the loss on the calibration windows (pure quantized inputs), else the start is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .grouping import Grouping, to_scale
from .method import BlockTask


class _Affine(torch.autograd.Function):
    """z + sum_i a_i B_i from int8 planes, without a float tensor per plane in the graph."""

    @staticmethod
    def forward(ctx, scale: Tensor, offset: Tensor, planes: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(planes)
        total = offset.unsqueeze(1).expand(planes.shape[1:]).clone()
        for plane, factor in zip(planes, scale, strict=True):
            total += plane * factor.unsqueeze(1)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        (planes,) = ctx.saved_tensors
        return torch.stack([(gradient * plane).sum(1) for plane in planes]), gradient.sum(1), None


@dataclass
class LayerState:
    """A layer while it is being solved: planes int8 +-1 [P, R, g], scale fp32 [P, R], offset fp32 [R]."""

    grouping: Grouping
    planes: Tensor
    scale: Tensor
    offset: Tensor

    def weight(self) -> Tensor:
        """The dense weight [N, K] with coefficients rounded as stored."""
        scale, offset = to_scale(self.scale).float(), to_scale(self.offset).float()
        weight: Tensor = _Affine.apply(scale, offset, self.planes)  # type: ignore[no-untyped-call]
        return self.grouping.join(weight)

    def trained(self) -> Tensor:
        """The dense weight [N, K] with coefficients as they are, differentiable in them."""
        weight: Tensor = _Affine.apply(self.scale, self.offset, self.planes)  # type: ignore[no-untyped-call]
        return self.grouping.join(weight)


@dataclass(frozen=True)
class Training:
    """steps: optimiser steps; batch_size: windows a step; input_mix: share of quantized-chain inputs."""

    steps: int
    learning_rate: float
    batch_size: int
    input_mix: float
    train_offset: bool


def _parameters(task: BlockTask, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.weight": w.T if name in task.transposed else w for name, w in weights.items()}


def _output(task: BlockTask, weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """The block's output with `weights` [N, K] in place of its own."""

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = task.block

        def forward(self, hidden: Tensor) -> Tensor:
            return task.call(self.block, hidden)

    named = {f"block.{name}": value for name, value in _parameters(task, weights).items()}
    output: Tensor = functional_call(Caller(), named, (hidden,))
    return output


@torch.no_grad()
def block_loss(task: BlockTask, weights: dict[str, Tensor], inputs: Tensor, batch_size: int) -> float:
    """Mean squared error of the block's output against the targets, over all windows."""
    assert task.targets is not None
    total, device = 0.0, next(iter(weights.values())).device
    for start in range(0, len(inputs), batch_size):
        rows = slice(start, start + batch_size)
        output = _output(task, weights, inputs[rows].to(device))
        total += float((output - task.targets[rows].to(device)).square().sum(dtype=torch.float64))
    return total / task.targets.numel()


def reconstruct(
    task: BlockTask, layers: dict[str, LayerState], chain: Tensor, training: Training
) -> tuple[float, float]:
    """Train the scales (and offsets) of `layers` in place; returns the loss before and after.

    `chain` holds the quantized model's inputs to the block, [n, S, hidden].
    """
    assert task.inputs is not None
    assert task.targets is not None
    before = block_loss(task, {name: layer.weight() for name, layer in layers.items()}, chain, training.batch_size)
    if not training.steps:
        return before, before
    start = {name: (layer.scale, layer.offset) for name, layer in layers.items()}
    unit = {name: layer.scale.square().mean().sqrt().clamp_min(1e-12) for name, layer in layers.items()}
    free = {
        name: (torch.zeros_like(layer.scale).requires_grad_(), torch.zeros_like(layer.offset))
        for name, layer in layers.items()
    }
    trained = [scale for scale, _ in free.values()]
    if training.train_offset:
        trained += [offset.requires_grad_() for _, offset in free.values()]
    optimizer = torch.optim.Adam(trained, lr=training.learning_rate)

    order = torch.empty(0, dtype=torch.int64)
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * (1 + math.cos(math.pi * step / training.steps)) / 2
        if not len(order):
            order = torch.randperm(len(chain), generator=task.generator)
        chosen, order = order[: training.batch_size], order[training.batch_size :]
        mixed = _mix(task.inputs[chosen], chain[chosen], training.input_mix, task.generator)
        weights = {}
        for name, layer in layers.items():
            scale, offset = (base + unit[name] * delta for base, delta in zip(start[name], free[name], strict=True))
            weights[name] = layer.grouping.join(_Affine.apply(scale, offset, layer.planes))  # type: ignore[no-untyped-call]
        device = next(iter(weights.values())).device
        loss = (_output(task, weights, mixed.to(device)) - task.targets[chosen].to(device)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    for name, layer in layers.items():
        layer.scale, layer.offset = (
            (base + unit[name] * delta).detach() for base, delta in zip(start[name], free[name], strict=True)
        )
    after = block_loss(task, {name: layer.weight() for name, layer in layers.items()}, chain, training.batch_size)
    if not after < before:  # also when it is NaN
        for name, layer in layers.items():
            layer.scale, layer.offset = start[name]
        after = before
    return before, after


def _mix(full: Tensor, quantized: Tensor, share: float, generator: torch.Generator) -> Tensor:
    if share >= 1:
        return quantized
    take = torch.rand(full.shape, generator=generator) < share
    return torch.where(take.to(full.device), quantized, full)
