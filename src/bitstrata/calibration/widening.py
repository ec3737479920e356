"""Weights kept in the dtype of their file, and widened to fp32 where they are multiplied: same numbers, less memory.

That is for what is exactly `nn.Linear` or `nn.Embedding`: another class may read its weight's dtype. A linear widens a
stretch of its rows at a time, an embedding the rows that it looks up. Where products are made in fewer bits anyway
(torch.autocast), a linear takes the weight as it is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..solvers.grouping import row_chunks

STRETCH = 1 << 24  # numbers of a weight that are widened at a time


def may_stay_narrow(module: nn.Module, prefix: str) -> set[str]:
    """Names of parameters in `module`, whose own name is `prefix`, that `widening` can handle."""
    start = f"{prefix}." if prefix else ""
    return {f"{start}{name}.weight" for name, part in module.named_modules() if type(part) in (nn.Linear, nn.Embedding)}


@contextlib.contextmanager
def widening(module: nn.Module) -> Iterator[None]:
    """`module` computes in fp32 although some of its weights are narrower."""
    widened: list[nn.Module] = []
    try:
        for part in module.modules():
            weight = part._parameters.get("weight")
            if weight is None or weight.is_meta or not weight.is_floating_point() or weight.dtype == torch.float32:
                continue
            if type(part) is nn.Linear:
                part.__dict__["forward"] = functools.partial(_linear, part)
            elif type(part) is nn.Embedding:
                part.__dict__["forward"] = functools.partial(_embedding, part)
            else:
                continue
            widened.append(part)
        yield
    finally:
        for part in widened:
            del part.__dict__["forward"]


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    if weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
        return nn.functional.linear(x, weight, bias)
    parts = [
        nn.functional.linear(x, weight[rows].to(x.dtype), None if bias is None else bias[rows])
        for rows in row_chunks(len(weight), weight.shape[1], STRETCH)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _embedding(module: nn.Embedding, ids: Tensor) -> Tensor:
    return nn.Embedding.forward(module, ids).float()
