"""A small decoder block and the task that a method gets for it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitstrata.quantization.block_task import BlockTask

HIDDEN, INNER = 24, 40


class Block(nn.Module):
    """h + down(tanh(up(h))); with `transposed` its linears are Conv1D holding the same weights."""

    def __init__(self, seed: int, *, transposed: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        up = torch.randn(INNER, HIDDEN, generator=generator) / HIDDEN**0.5
        down = torch.randn(HIDDEN, INNER, generator=generator) / INNER**0.5
        self.up, self.down = (_linear(weight, transposed) for weight in (up, down))

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = hidden + self.down(torch.tanh(self.up(hidden)))
        return output


def _linear(weight: Tensor, transposed: bool) -> nn.Module:
    rows, columns = weight.shape
    layer = Conv1D(rows, columns) if transposed else nn.Linear(columns, rows)
    layer.weight.data = weight.T.contiguous() if transposed else weight
    layer.bias.data.zero_()
    return layer.requires_grad_(False)


def make_task(
    bits: tuple[int, ...], *, seed: int = 0, transposed: bool = False, noise: float = 0.3, said: list[str] | None = None
) -> BlockTask:
    """A task on 6 windows of 5 tokens; the chain of p bits is off the original by noise / 2**p."""
    block = Block(seed, transposed=transposed)
    generator = torch.Generator().manual_seed(seed + 1)
    inputs = torch.randn(6, 5, HIDDEN, generator=generator)
    chains = {
        p: inputs + noise * 2.0**-p * torch.randn(6, 5, HIDDEN, generator=torch.Generator().manual_seed(seed + 10 + p))
        for p in range(1, 9)
    }
    names: Iterable[str] = ("up", "down")
    weights = {name: block.get_submodule(name).weight for name in names}
    with torch.no_grad():
        targets = block(inputs)
    return BlockTask(
        block=block,
        weights={name: (w.T if transposed else w).detach().contiguous() for name, w in weights.items()},  # type: ignore[union-attr, misc]
        transposed=frozenset(names if transposed else ()),
        bits=bits,
        group_size=16,
        call=lambda module, hidden: module(hidden),
        inputs=inputs,
        targets=targets,
        chains={p: chains[p] for p in bits},
        generator=torch.Generator().manual_seed(seed),
        say=(said if said is not None else []).append,
    )
