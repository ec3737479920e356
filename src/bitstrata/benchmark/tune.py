"""The fastest shapes of programs of the Triton kernels on the GPU at hand, kept where they look for them.

kernels/triton/config.py says what is kept, where, and which rules hold without it. A candidate is timed as in
linear.py, on copies that no cache holds, and what wins must give the numbers of the shape used before.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import CheckError, KernelError, ResourceError
from ..kernels.triton import KERNEL, TiledWeight, config
from ..kernels.triton.tiled import DENSE_ROWS, FEW_ROWS
from ..progress import log
from .clock import timer
from .linear import beyond_cache
from .random_model import random_weight

DIFFERENCE = 1e-2  # relative, between two orders of the same sums in bf16
Candidate = TypeVar("Candidate", config.FewRows, config.ManyRows)


@dataclass(frozen=True)
class Tuned:
    """What was found for a product of up to `rows` rows. Times in seconds; before: of the shape used until now."""

    out_features: int
    in_features: int
    bits: int
    rows: int
    config: dict[str, int]
    time: float
    before: float


def check_tunable(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
    """Raises KernelError where the kernels cannot run, ResourceError where what is found could not be kept."""
    reason = KERNEL.can_run(device.type, dtype)
    if device.type != "cuda" or reason is not None:
        raise KernelError(
            f"there are no kernels to tune here: {reason or f'tensors are on {device}'}",
            hint="--tune is for the Triton kernels on a CUDA device; `bitstrata env` says what is there",
        )
    try:
        config.save(device, config.Measured())
    except OSError as error:
        raise ResourceError(
            f"cannot write into {config.user_folder()}: {error.strerror or error}",
            hint="set XDG_CACHE_HOME to a folder that you may write to",
        ) from error


def tune(
    shapes: Iterable[tuple[int, int]],
    bits: Sequence[int],
    rows: Sequence[int],
    *,
    device: torch.device,
    group_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    rounds: int = 7,
) -> tuple[list[Tuned], Path]:
    """Search for each (out_features, in_features) and keep what is fastest; the results, and the file that has them.

    rows: up to FEW_ROWS stand for the few-row kernel, which is tuned at one row; for more, below
    DENSE_ROWS, the tile kernel is tuned at the next of config.ROW_STEPS.

    Raises as `check_tunable`, and CheckError if the fastest gives other numbers.
    """
    check_tunable(device, dtype)
    steps = sorted({next(step for step in config.ROW_STEPS if count <= step) for count in rows if _is_tiled(count)})
    few = any(count <= FEW_ROWS for count in rows)
    found: list[Tuned] = []
    path = config.user_folder()
    for out_features, in_features in shapes:
        log.info(f"tuning {out_features}x{in_features}")
        search = _Search(out_features, in_features, bits, device, group_size, dtype, rounds)
        measured = config.Measured()
        if few:
            measured.few_rows[config.shape_key(search.weights[0])] = search.few_rows()
        for step in steps:
            for value in bits:
                key = config.many_rows_key(search.weights[0], value, step)
                measured.many_rows[key] = search.many_rows(value, min(step, DENSE_ROWS - 1))
        path = config.save(device, measured)
        found += search.found
    return found, path


def _is_tiled(rows: int) -> bool:
    return FEW_ROWS < rows < DENSE_ROWS


class _Search:
    """One weight's shape."""

    def __init__(
        self,
        out_features: int,
        in_features: int,
        bits: Sequence[int],
        device: torch.device,
        group_size: int,
        dtype: torch.dtype,
        rounds: int,
    ) -> None:
        self.bits, self.rounds, self.dtype = tuple(bits), rounds, dtype
        self.generator = torch.Generator(device).manual_seed(0)
        stored = random_weight(out_features, in_features, self.bits, group_size, self.generator)
        copies = max(2, -(-beyond_cache(device) // stored.bytes_read(min(bits))))
        self.weights = [TiledWeight.pack(stored, KERNEL) for _ in range(copies)]
        self.found: list[Tuned] = []

    def few_rows(self) -> dict[int, config.FewRows]:
        """One number of warps for all bits, the least sum of shares of each bits' best; with it the best of each."""
        from ..kernels.triton import launch

        x, first = self._input(1), self.weights[0]
        times: dict[int, dict[config.FewRows, float]] = {}
        before: dict[int, float] = {}
        for value in self.bits:
            used = config.few_rows(first, value, 1, False)
            call = partial(launch.few_rows, x)
            times[value] = self._times([used, *config.few_rows_candidates()], call, value)
            before[value] = times[value][used]
        warps = _warps(times)
        chosen = {}
        for value in self.bits:
            best = _fastest({c: seconds for c, seconds in times[value].items() if c.warps == warps})
            self._check(launch.few_rows(x, first, value), launch.few_rows(x, first, value, best), value)
            self._add(value, 1, best, times[value][best], before[value])
            chosen[value] = best
        return chosen

    def many_rows(self, bits: int, rows: int) -> config.ManyRows:
        from ..kernels.triton import launch

        x, first = self._input(rows), self.weights[0]
        used = config.many_rows(first, bits, rows)
        times = self._times([used, *config.many_rows_candidates()], partial(launch.tiles, x), bits)
        best = _fastest(times)
        self._check(launch.tiles(x, first, bits), launch.tiles(x, first, bits, best), bits)
        self._add(bits, rows, best, times[best], times[used])
        return best

    def _input(self, rows: int) -> Tensor:
        columns, device = self.weights[0].in_features, self.generator.device
        return torch.randn(rows, columns, generator=self.generator, device=device).to(self.dtype)

    def _times(
        self, candidates: Sequence[Candidate], call: Callable[[TiledWeight, int, Candidate], object], bits: int
    ) -> dict[Candidate, float]:
        """Median seconds of each candidate that the device can run, the first of which must."""
        from triton.runtime.errors import TritonError

        times: dict[Candidate, float] = {}
        for candidate in dict.fromkeys(candidates):
            calls = [partial(call, weight, bits, candidate) for weight in self.weights]
            try:
                one_round = timer(partial(_in_turn, calls), len(calls), self.generator.device)
            except (TritonError, RuntimeError):  # out of registers, threads or shared memory
                if not times:
                    raise
                continue
            times[candidate] = statistics.median(one_round() for _ in range(self.rounds))
        return times

    def _check(self, expected: Tensor, y: Tensor, bits: int) -> None:
        difference = float((y.double() - expected.double()).norm() / expected.double().norm())
        if not difference <= DIFFERENCE:
            first = self.weights[0]
            raise CheckError(
                f"two shapes of programs differ by {difference:.2g} at {bits} bits, "
                f"[{first.out_features}, {first.in_features}]",
                hint="nothing was kept for this shape; please report this with the output of `bitstrata env`",
            )

    def _add(self, bits: int, rows: int, best: Any, seconds: float, before: float) -> None:
        first = self.weights[0]
        self.found.append(Tuned(first.out_features, first.in_features, bits, rows, asdict(best), seconds, before))


def _in_turn(calls: Sequence[Callable[[], object]], index: int) -> object:
    return calls[index]()


def _fastest(times: dict[Candidate, float]) -> Candidate:
    return min(times, key=lambda candidate: times[candidate])


def _warps(times: dict[int, dict[config.FewRows, float]]) -> int:
    """The number of warps with which all bits together lose least against each one's own best."""
    common = set.intersection(*({candidate.warps for candidate in of_bits} for of_bits in times.values()))

    def cost(warps: int) -> float:
        return sum(
            min(seconds for candidate, seconds in of_bits.items() if candidate.warps == warps) / min(of_bits.values())
            for of_bits in times.values()
        )

    return min(sorted(common), key=cost)
