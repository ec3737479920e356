"""bitstrata: one nested weight of 4 planes, read at 2, 3 and 4 bits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitstrata.benchmark.random_model import random_weight
from bitstrata.kernels import Weight, cpu, pack, select
from bitstrata.planes import PlaneWeight, decode
from bitstrata.version import __version__

from .contender import Contender, Problem

BITS = (2, 3, 4)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def missing() -> str | None:
    if cpu.missing:
        return f"bitstrata has no native kernels here ({cpu.missing})"
    return None


def versions() -> dict[str, str]:
    kernel = select("cpu", torch.float32).name
    return {"bitstrata": __version__, "bitstrata kernel": kernel}


def contenders(problem: Problem) -> list[Contender]:
    generator = torch.Generator().manual_seed(problem.seed)
    stored = random_weight(problem.out_features, problem.in_features, BITS, problem.group_size, generator)
    copies = problem.copies(stored.bytes_read(min(BITS)))
    weights = [pack(stored) for _ in range(copies)]
    return [
        Contender(
            "ours",
            f"ours {bits} bits",
            name,
            stored.bytes_read(bits),
            x,
            [_call(x, weight, bits) for weight in weights],
            _result(x, weights, bits),
            _decoded(stored, bits),
            bits,
        )
        for bits in BITS
        for name, dtype in DTYPES.items()
        for x in [problem.x.to(dtype)]
    ]


def _call(x: Tensor, weight: Weight, bits: int) -> Callable[[], object]:
    return lambda: weight.linear(x, bits)


def _result(x: Tensor, weights: list[Weight], bits: int) -> Callable[[int], Tensor]:
    return lambda index: weights[index].linear(x, bits)


def _decoded(stored: PlaneWeight, bits: int) -> Callable[[int, int], Tensor]:
    return lambda first, last: decode(stored.outputs(first, last), bits, torch.float64)
