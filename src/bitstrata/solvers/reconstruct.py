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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .grouping import Grouping, to_scale
from .method import Block, Windows


class _Affine(torch.autograd.Function):
    """z + sum_i a_i B_i from int8 planes, without a float tensor per plane in the graph."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, offset: Tensor, planes: Tensor) -> Tensor:
        ctx.save_for_backward(planes)
        total = offset.unsqueeze(1).expand(planes.shape[1:]).clone()
        for plane, factor in zip(planes, scale, strict=True):
            total += plane * factor.unsqueeze(1)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,), (planes,) = gradients, ctx.saved_tensors
        return torch.stack([(gradient * plane).sum(1) for plane in planes]), gradient.sum(1), None


def dense(grouping: Grouping, planes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """[N, K], differentiable in scale [P, R] and offset [R]; planes int8 +-1 [P, R, g]."""
    weight: Tensor = _Affine.apply(scale, offset, planes)  # type: ignore[no-untyped-call]
    return grouping.join(weight)


@dataclass
class LayerState:
    """A layer while it is being solved: planes int8 +-1 [P, R, g], scale fp32 [P, R], offset fp32 [R]."""

    grouping: Grouping
    planes: Tensor
    scale: Tensor
    offset: Tensor

    def weight(self) -> Tensor:
        """The dense weight [N, K] with coefficients rounded as stored."""
        return dense(self.grouping, self.planes, to_scale(self.scale).float(), to_scale(self.offset).float())


@dataclass(frozen=True)
class Training:
    """steps: optimiser steps; batch_size: windows a step; input_mix: share of quantized-chain inputs."""

    steps: int
    learning_rate: float
    batch_size: int
    input_mix: float
    train_offset: bool


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of `size` of `count` windows, without end; each pass in a new order, its last batch maybe shorter."""
    while True:
        yield from torch.randperm(count, generator=generator).split(size)


def cosine(step: int, steps: int) -> float:
    """The share of the learning rate at `step`: from 1 to 0."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def block_loss(block: Block, weights: Mapping[str, Tensor], inputs: Windows, batch_size: int) -> float:
    """Mean squared error of the block's output with `weights` against the targets, over all windows."""
    assert block.targets is not None
    total, device = 0.0, next(iter(weights.values())).device
    for start in range(0, len(inputs), batch_size):
        rows = slice(start, start + batch_size)
        output = block.output(weights, inputs[rows].to(device))
        total += float((output - block.targets[rows].to(device)).square().sum(dtype=torch.float64))
    return total / block.targets.shape.numel()


def reconstruct(
    block: Block, layers: Mapping[str, LayerState], chain: Windows, training: Training
) -> tuple[float, float]:
    """Train the scales (and offsets) of `layers` in place; returns the loss before and after.

    `chain` holds the quantized model's inputs to the block, [n, S, hidden].
    """
    assert block.inputs is not None
    assert block.targets is not None

    def loss() -> float:
        return block_loss(block, {name: layer.weight() for name, layer in layers.items()}, chain, training.batch_size)

    before = loss()
    if not training.steps:
        return before, before
    device = next(iter(layers.values())).scale.device
    start = {name: (layer.scale, layer.offset) for name, layer in layers.items()}
    unit = {name: layer.scale.square().mean().sqrt().clamp_min(1e-12) for name, layer in layers.items()}
    scales = [torch.zeros_like(layer.scale, requires_grad=True) for layer in layers.values()]
    offsets = [torch.zeros_like(layer.offset, requires_grad=training.train_offset) for layer in layers.values()]
    change = dict(zip(layers, zip(scales, offsets, strict=True), strict=True))
    optimizer = torch.optim.Adam([*scales, *offsets] if training.train_offset else scales, lr=training.learning_rate)

    def current(name: str) -> tuple[Tensor, Tensor]:
        scale, offset = (base + unit[name] * delta for base, delta in zip(start[name], change[name], strict=True))
        return scale, offset

    chosen = batches(len(chain), training.batch_size, block.generator)
    for step in range(training.steps):
        set_rate(optimizer, training.learning_rate * cosine(step, training.steps))
        rows = next(chosen)
        mixed = _mix(block.inputs[rows], chain[rows], training.input_mix, block.generator)
        weights = {name: dense(layer.grouping, layer.planes, *current(name)) for name, layer in layers.items()}
        error = (block.output(weights, mixed.to(device)) - block.targets[rows].to(device)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        optimizer.step()

    for name, layer in layers.items():
        layer.scale, layer.offset = (value.detach() for value in current(name))
    after = loss()
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
