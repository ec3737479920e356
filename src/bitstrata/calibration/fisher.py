"""How much the loss minds a change of each weight: the diagonal of the empirical Fisher matrix.

    F[n, k] = sum over windows of (d loss / d W[n, k])^2,   loss = mean next-token cross-entropy

The square is taken of each window's gradient, then summed, in fp32: 16-bit sums lose the later
windows. A second-order expansion of the loss around the trained weights has this diagonal in place
of its Hessian's, so sum_k F_k (w_k - q_k)^2 estimates what quantizing adds to the loss.

The gradient at one weight depends on all blocks above, so unlike everything else here this holds
the WHOLE model, in fp32:

    weights + F (as large as the quantized weights) + the largest layer's gradient
    + one window: seq_len x (inputs and outputs of all linears x 2 + vocabulary x 3) x 4 bytes
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError
from ..models.discover import Discovery
from ..planes.weights import all_finite
from .block_runner import BlockRunner


def fisher_bytes(model: PreTrainedModel, discovery: Discovery, seq_len: int) -> int:
    """An estimate of the memory that `fisher_diagonal` takes, in bytes, as above."""
    widths = sum(linear.in_features + linear.out_features for linear in discovery.linears)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    largest = max(linear.in_features * linear.out_features for linear in discovery.linears)
    weights = sum(parameter.numel() for parameter in model.parameters())
    return int(4 * (weights + discovery.weight_count + largest + seq_len * (2 * widths + 3 * vocabulary)))


def fisher_diagonal(runner: BlockRunner, windows: Tensor, step: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
    """Quantized linear's name -> F fp32 [N, K] on the CPU; like W it is turned over where the source stores W^T.

    Args:
        windows: tokens int64 [n, S], a window at a time.
        step: called after each window.

    Raises ModelError naming a layer whose gradients are not finite.
    """
    linears = runner.discovery.linears
    sums = {}
    with runner.whole() as model:
        for linear in linears:
            weight = model.get_submodule(linear.name).weight
            assert isinstance(weight, nn.Parameter)
            weight.requires_grad_(True)
            sums[linear.name] = torch.zeros_like(weight, requires_grad=False)
            # squared and dropped as soon as it is there, so that one layer's gradient exists at a time
            weight.register_post_accumulate_grad_hook(partial(_add_square, sums[linear.name]))
        for window in windows.to(runner.device):
            logits = model(input_ids=window.unsqueeze(0), use_cache=False).logits
            nn.functional.cross_entropy(logits[0, :-1].float(), window[1:]).backward()
            step()
    for name, total in sums.items():
        if not all_finite(total):
            raise ModelError(
                f"{name}: the gradients of the loss on the calibration text are not finite",
                hint="the model overflows in fp32; --preset fast needs no gradients",
            )
    return {
        linear.name: (sums[linear.name].T if linear.transposed else sums[linear.name]).cpu().contiguous()
        for linear in linears
    }


def _add_square(total: Tensor, weight: Tensor) -> None:
    assert weight.grad is not None
    total.addcmul_(weight.grad, weight.grad)
    weight.grad = None
