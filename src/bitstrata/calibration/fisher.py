"""How much the loss minds a change of each weight: the diagonal of the empirical Fisher matrix.

    F[n, k] = sum over windows of (d loss / d W[n, k])^2,   loss = mean next-token cross-entropy

The square is taken of each window's gradient, then summed, in fp32: 16-bit sums lose the later
windows. A second-order expansion of the loss around the trained weights has this diagonal in place
of its Hessian's, so sum_k F_k (w_k - q_k)^2 estimates what quantizing adds to the loss.

All windows pass the blocks from the first to the last, and then their derivatives from the last to
the first, where each block runs again on what it read (activation checkpointing). So each block is
read twice, what stands before it is in files (windows x hidden states x 4 bytes a block), and memory is

    max(what lies outside the blocks + one window's logits x 3,
        a block in fp32 + its F + its largest layer's gradient + one window's inputs and outputs of its linears x 2)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError
from ..models.discover import Discovery
from ..planes.weights import all_finite
from ..scratch import Scratch
from .block_runner import BlockRunner

Found = Callable[[int, Mapping[str, Tensor]], None]


def fisher_bytes(model: PreTrainedModel, discovery: Discovery, seq_len: int) -> int:
    """An estimate of the memory that `fisher_diagonal` takes, in bytes, as above."""
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    outside, most = sum(parameters.values()), 0
    for index, name in enumerate(discovery.blocks):
        linears = discovery.of_block(index)
        inside = sum(count for each, count in parameters.items() if each.startswith(f"{name}."))
        sizes = [linear.in_features * linear.out_features for linear in linears]
        widths = sum(linear.in_features + linear.out_features for linear in linears)
        most = max(most, inside + sum(sizes) + max(sizes, default=0) + 2 * seq_len * widths)
        outside -= inside
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return int(4 * max(most, outside + 3 * seq_len * vocabulary))


def fisher_diagonal(
    runner: BlockRunner,
    windows: Tensor,
    found: Found,
    folder: Path | None = None,
    step: Callable[[], None] = lambda: None,
) -> None:
    """F of all quantized linears, a block at a time.

    Args:
        windows: tokens int64 [n, S], a window at a time.
        found: called for each block, the last one first, with its index, and linear -> F fp32 [N, K] on the CPU, which
            is then dropped; like W, F is turned over where the source stores W^T.
        folder: where hidden states lie meanwhile; None for the system's own place.
        step: called after each pass of all windows over a block, forward and backward, or over what follows the blocks.

    Raises ModelError naming a layer whose gradients are not finite.
    """
    before: list[Scratch] = []  # hidden states before each block, [1, S, hidden] a window
    gradients = Scratch(folder, torch.float32)
    try:
        before.append(Scratch(folder, torch.float32))
        for part in runner.embedded(windows):
            for hidden in part.split(1):
                before[0].append(hidden)
        count = len(runner.discovery.blocks)
        for index in range(count):
            before.append(Scratch(folder, torch.float32))
            with runner.block(index) as block, torch.no_grad():
                for hidden in before[index]:
                    before[-1].append(runner.call(index, block, hidden.to(runner.device)))
            step()
        _of_logits(runner, windows, before[-1], gradients)
        step()
        for index in reversed(range(count)):
            before.pop().close()
            gradients = _of_block(runner, index, before[-1], gradients, found, folder)
            step()
    finally:
        for kept in (*before, gradients):
            kept.close()


def _of_logits(runner: BlockRunner, windows: Tensor, states: Scratch, gradients: Scratch) -> None:
    """The derivatives of each window's loss by the hidden states after the last block."""
    with runner.ends() as ends:
        for window, hidden in zip(windows.split(1), states, strict=True):
            last = hidden.to(runner.device).requires_grad_()
            logits = ends.logits(last, window, {})[0, :-1]
            loss = nn.functional.cross_entropy(logits, window[0, 1:].to(runner.device))
            gradients.append(torch.autograd.grad(loss, last)[0])


def _of_block(
    runner: BlockRunner, index: int, states: Scratch, gradients: Scratch, found: Found, folder: Path | None
) -> Scratch:
    """Find F of a block's linears, and return the derivatives by what it reads, from those by what it returns."""
    prefix, linears = f"{runner.discovery.blocks[index]}.", runner.discovery.of_block(index)
    sums, earlier = {}, Scratch(folder, torch.float32)
    with runner.block(index, narrow=False) as block:
        for linear in linears:
            weight = block.get_submodule(linear.name.removeprefix(prefix)).weight
            assert isinstance(weight, nn.Parameter)
            weight.requires_grad_(True)
            sums[linear.name] = torch.zeros_like(weight, requires_grad=False)
            # squared and dropped as soon as it is there, so that one layer's gradient exists at a time
            weight.register_post_accumulate_grad_hook(partial(_add_square, sums[linear.name]))
        for state, gradient in zip(states, gradients, strict=True):
            hidden = state.to(runner.device).requires_grad_(index > 0)
            output = runner.call(index, block, hidden)
            if output.requires_grad:
                output.backward(gradient.to(runner.device))
            if hidden.grad is not None:
                earlier.append(hidden.grad)
    gradients.close()
    for name, total in sums.items():
        if not all_finite(total):
            earlier.close()
            raise ModelError(
                f"{name}: the gradients of the loss on the calibration text are not finite",
                hint="the model overflows in fp32; --preset fast needs no gradients",
            )
    turned = {linear.name for linear in linears if linear.transposed}
    found(index, {name: (of.T if name in turned else of).cpu().contiguous() for name, of in sums.items()})
    return earlier


def _add_square(total: Tensor, weight: Tensor) -> None:
    assert weight.grad is not None
    total.addcmul_(weight.grad, weight.grad)
    weight.grad = None
