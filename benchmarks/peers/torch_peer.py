"""torch: dense products in bf16 and fp32, and its own 4-bit product with bf16 activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .contender import Contender, Problem

DENSE = {"bf16": torch.bfloat16, "fp32": torch.float32}
TILES = 2  # the packing op wants a value; on CPUs it changes nothing


def missing() -> str | None:
    return None


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "torch isa": torch.backends.cpu.get_cpu_capability()}


def contenders(problem: Problem) -> list[Contender]:
    found = [_dense(problem, name, dtype) for name, dtype in DENSE.items()]
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        problem.skipped.append("torch int4: this torch has no aten::_weight_int4pack_mm_for_cpu")
        return found
    try:
        found.append(_int4(problem))
    except (RuntimeError, NotImplementedError) as error:
        problem.skipped.append(f"torch int4: {str(error).splitlines()[0]}")
    return found


def _dense(problem: Problem, name: str, dtype: torch.dtype) -> Contender:
    matrix = problem.weight.to(dtype)
    matrices = [matrix, *(matrix.clone() for _ in range(problem.copies(matrix.nbytes) - 1))]
    x = problem.x.to(dtype)

    def call(weight: Tensor) -> Callable[[], Tensor]:
        return lambda: functional.linear(x, weight)

    calls = [call(weight) for weight in matrices]
    return Contender(
        "torch",
        f"torch {name}",
        name,
        matrix.nbytes,
        x,
        calls,
        lambda index: calls[index](),
        lambda first, last: matrix[first:last].double(),
    )


def _int4(problem: Problem) -> Contender:
    """Codes 0..15 mean (code - 8) * scale + zero, one bf16 pair for each group; zero stays 0 here."""
    group, x = problem.group_size, problem.x.bfloat16()
    grouped = problem.weight.unflatten(1, (-1, group))  # [N, K/group, group]
    scale = (grouped.abs().amax(-1, keepdim=True) / 7.5).bfloat16()
    codes = (grouped / scale.float()).round().add(8).clamp(0, 15).to(torch.int32)
    pairs = torch.cat([scale, torch.zeros_like(scale)], dim=-1).transpose(0, 1).contiguous()  # [K/group, N, 2]
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1), TILES)
    size = packed.nbytes + pairs.nbytes
    copies = problem.copies(size)
    matrices = [(packed, pairs), *((packed.clone(), pairs.clone()) for _ in range(copies - 1))]
    small = codes.to(torch.int8)

    def call(weight: Tensor, scales: Tensor) -> Callable[[], Tensor]:
        return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, group, scales)

    def decoded(first: int, last: int) -> Tensor:
        return ((small[first:last].double() - 8) * scale[first:last].double()).flatten(1)

    calls: Sequence[Callable[[], Tensor]] = [call(*pair) for pair in matrices]
    return Contender("torch", "torch int4", "bf16", size, x, list(calls), lambda index: calls[index](), decoded, 4)
