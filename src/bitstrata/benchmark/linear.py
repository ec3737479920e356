"""Single layers: time against the bytes that must be read, and against torch's dense product.

All contenders of a shape take turns: a round times each of them once, so that a change in the
machine's speed meets all alike. The time of a round is the median of its calls; ratios are taken
within a round, and medians over rounds.

Two regimes. `cache`: one matrix again and again, as large as it is. `memory`: a set of copies that
is larger than the cache takes turns, as the layers of a model do. clock.py says how a device is timed.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels import Weight, pack
from ..planes import PlaneWeight
from .clock import timer
from .machine import CPU, Bandwidth
from .random_model import random_weight
from .verify import verify

REGIMES = ("cache", "memory")
MEMORY_BYTES = 1 << 28  # of the copies at the lowest bits, together
MOST_COPIES = 4096  # a smaller matrix is never read from memory in a model either


@dataclass(frozen=True)
class LinearResult:
    """One shape at one number of rows and bits. Times in seconds; `bits` None for a product not at one of ours.

    floor: bytes over the measured streaming bandwidth; share: floor / time, None in the cache regime,
    where the bandwidth of memory is no bound. ratio_bf16, ratio_fp32: torch's time over this one's.
    """

    out_features: int
    in_features: int
    rows: int
    bits: int | None
    name: str
    regime: str
    bytes: int
    floor: float
    time: float
    share: float | None
    ratio_bf16: float
    ratio_fp32: float
    error: float | None

    def beside(self, bytes_per_second: float) -> LinearResult:
        """The same result, with floor and share by this bandwidth."""
        floor = self.bytes / bytes_per_second
        return replace(self, floor=floor, share=None if self.share is None else floor / self.time)


@dataclass(frozen=True)
class Contender:
    """Something to time: `call(i)` makes one product with copy i of its matrix."""

    name: str
    bits: int | None
    bytes: int
    copies: int
    call: Callable[[int], object]
    error: float | None = None


def bench_linear(
    out_features: int,
    in_features: int,
    *,
    bits: Sequence[int],
    rows: Sequence[int],
    bandwidth: Bandwidth,
    group_size: int = 128,
    regimes: Sequence[str] = REGIMES,
    rounds: int = 7,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: torch.device = CPU,
    mixed: bool = False,
    peers: Callable[[Tensor], Sequence[Contender]] | None = None,
) -> list[LinearResult]:
    """Time y = x @ W^T for W [out_features, in_features] at each of `bits` and of `rows`.

    Args:
        mixed: where there are several rows, also rows that take `bits` in turn, in one call.
        peers: further contenders for an input [rows, in_features], in the memory regime only.

    A matrix of which MOST_COPIES do not exceed the cache is measured from cache only. Raises CheckError before
    anything is timed if a kernel is wrong on this shape.
    """
    generator = torch.Generator(device).manual_seed(seed)
    stored = random_weight(out_features, in_features, tuple(bits), group_size, generator)
    first = pack(stored, dtype=dtype)
    inputs = {count: torch.randn(count, in_features, generator=generator, device=device).to(dtype) for count in rows}
    asked: dict[int, dict[str, int | Tensor]] = {count: {f"{value} bits": value for value in bits} for count in rows}
    if mixed:
        turns = torch.tensor(bits, device=device)
        for count in (count for count in rows if count > 1):
            asked[count]["mixed bits"] = turns[torch.arange(count, device=device) % len(bits)]
    errors = {
        (count, name): verify(inputs[count], stored, first, value)
        for count in rows
        for name, value in asked[count].items()
    }
    per_copy = min(stored.bytes_read(value) for value in bits)
    results = []
    for regime in regimes:
        copies = 1 if regime == "cache" else max(2, -(-beyond_cache(device) // per_copy))
        if copies > MOST_COPIES:
            continue
        weights = [first, *(_copy(stored, dtype) for _ in range(copies - 1))]
        dense = {kind: _dense(out_features, in_features, kind, regime, generator) for kind in DENSE}
        for count in rows:
            x = inputs[count]
            contenders = [
                Contender(
                    name,
                    value if isinstance(value, int) else None,
                    _bytes(stored, value, bits[:count]),
                    copies,
                    _planes_call(x, weights, value),
                    errors[count, name],
                )
                for name, value in asked[count].items()
            ]
            contenders += [
                Contender(kind, None, matrices[0].nbytes, len(matrices), _dense_call(x, matrices))
                for kind, matrices in dense.items()
            ]
            if peers is not None and regime == "memory":
                contenders += peers(x)
            results += _race(contenders, out_features, in_features, count, regime, rounds, bandwidth)
    return results


def beyond_cache(device: torch.device) -> int:
    """Bytes that copies together must have so that none is found in the cache."""
    if device.type != "cuda":
        return MEMORY_BYTES
    return max(MEMORY_BYTES, 3 * int(torch.cuda.get_device_properties(device).L2_cache_size))


def _bytes(stored: PlaneWeight, bits: int | Tensor, used: Sequence[int]) -> int:
    """What a product reads: with mixed rows each plane once, and the scales of all bits `used`."""
    if isinstance(bits, int):
        return stored.bytes_read(bits)
    planes = sum(plane.nbytes for plane in stored.planes[: max(used)])
    return planes + sum(stored.bytes_read(value) - sum(p.nbytes for p in stored.planes[:value]) for value in used)


DENSE = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _dense(out_features: int, in_features: int, kind: str, regime: str, generator: torch.Generator) -> list[Tensor]:
    device = generator.device
    matrix = torch.randn(out_features, in_features, generator=generator, device=device).to(DENSE[kind])
    copies = 1 if regime == "cache" else max(2, -(-beyond_cache(device) // matrix.nbytes))
    return [matrix, *(matrix.clone() for _ in range(copies - 1))]


def _copy(stored: PlaneWeight, dtype: torch.dtype) -> Weight:
    """Packed in memory of its own."""
    packed = pack(stored, dtype=dtype)
    return copy.deepcopy(packed) if packed.layout == "stored" else packed


def _planes_call(x: Tensor, weights: Sequence[Weight], bits: int | Tensor) -> Callable[[int], object]:
    return lambda index: weights[index].linear(x, bits)


def _dense_call(x: Tensor, matrices: Sequence[Tensor]) -> Callable[[int], object]:
    x = x.to(matrices[0].dtype)
    return lambda index: torch.nn.functional.linear(x, matrices[index])


def _race(
    contenders: Sequence[Contender],
    out_features: int,
    in_features: int,
    rows: int,
    regime: str,
    rounds: int,
    bandwidth: Bandwidth,
) -> list[LinearResult]:
    timers = [timer(contender.call, contender.copies, bandwidth.device) for contender in contenders]
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        bandwidth.sample()
        for index, one_round in enumerate(timers):
            times[index].append(one_round())
    by_name = {contender.name: times[index] for index, contender in enumerate(contenders)}
    results = []
    for contender in contenders:
        mine = by_name[contender.name]
        median, floor = statistics.median(mine), contender.bytes / bandwidth.bytes_per_second
        results.append(
            LinearResult(
                out_features,
                in_features,
                rows,
                contender.bits,
                contender.name,
                regime,
                contender.bytes,
                floor,
                median,
                floor / median if regime == "memory" else None,
                _ratio(by_name["bf16"], mine),
                _ratio(by_name["fp32"], mine),
                contender.error,
            )
        )
    return results


def _ratio(other: Sequence[float], mine: Sequence[float]) -> float:
    """How many times faster `mine` is, round by round."""
    return statistics.median(a / b for a, b in zip(other, mine, strict=True))
