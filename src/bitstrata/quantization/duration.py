"""How long a job will take, before it has begun: counted operations over the speed that this machine shows now.

    seconds = sum over stages (operations of its products) / (operations a second of such products, measured)

What is bound by memory is counted as so many operations, and reading and writing are not, so it is a guess within a
factor of two or so; the first finished block corrects it (`corrected`). `fitting` is for a time that was given: it runs
the first block on few windows and finds the most windows, and then the longest, with which the job ends in time.

All of it is measured in one process, and what several divide is taken to be as many times as fast; what they exchange
is not counted.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ..calibration import Windows
from ..errors import UsageError
from ..progress import in_words, log, own_notes
from .context import Job, Prepared, Stage, megabytes
from .gradients import sensitivity
from .stages import Blocks
from .state import JobState

SIDE = 1024  # of the product that is timed
FEW = (2, 6)  # windows that the first block is run on
LEAST_SAMPLES, LEAST_SEQ_LEN = 16, 128  # what a budget may come down to
LESS = (32, 512)  # windows, and tokens in each, of the shorter job that is told beside a long one
LONG = 600.0  # seconds


def operations_a_second(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions of a product of two matrices, the best of several."""
    one = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        product = one @ one
        float(product[0, 0])  # waits for it
        best = min(best, time.perf_counter() - began)
    return 2 * SIDE**3 / best


def expected_seconds(prepared: Prepared, blocks: float = 1.0) -> float:
    """An estimate of what the stages take here, as above; `blocks`: what that of the blocks is multiplied by."""
    total = 0.0
    speeds: dict[torch.dtype, float] = {}
    for stage in prepared.stages:
        factor = blocks if isinstance(stage, Blocks) else 1.0
        for dtype, count in stage.operations(prepared).items():
            if dtype not in speeds:
                speeds[dtype] = operations_a_second(prepared.settings.device, dtype)
            total += factor * count / speeds[dtype] / _processes(prepared, stage)
    return total


def _processes(prepared: Prepared, stage: Stage) -> int:
    """How many work on it."""
    return prepared.settings.processes if stage.divided else 1


def told(prepared: Prepared) -> str:
    """A sentence on time, memory and disk; of a long job also what fewer tokens would take."""
    seconds = expected_seconds(prepared)
    needs = f"{prepared.memory} and {megabytes(prepared.disk_bytes)} of disk"
    if not seconds:
        return f"needs about {needs}"
    said = f"takes about {in_words(seconds)} on this machine, by its speed at products, and {needs}"
    return said + _shorter(prepared, seconds)


def corrected(prepared: Prepared, first: float) -> str:
    """The same of time alone, once the first block took `first` seconds; empty of a short job."""
    expected = expected_seconds(replace(prepared, stages=(Blocks(),)))
    if not expected:
        return ""
    factor = first * len(prepared.discovery.blocks) / expected
    seconds = expected_seconds(prepared, factor)
    if seconds <= LONG:
        return ""
    return f"by its first block: about {in_words(seconds)} in all{_shorter(prepared, seconds, factor)}"


def _shorter(prepared: Prepared, seconds: float, factor: float = 1.0) -> str:
    """What fewer tokens would take where so many seconds are long."""
    samples, length = (min(pair) for pair in zip(LESS, _size(prepared), strict=True))
    if seconds <= LONG or (samples, length) == _size(prepared):
        return ""
    shorter = expected_seconds(_with_size(prepared, samples, length), factor)
    return (
        f"; with --num-samples {samples} --seq-len {length} about {in_words(shorter)} "
        "(what fewer tokens cost: docs/guides/quality.md)"
    )


def _size(prepared: Prepared) -> tuple[int, int]:
    settings = prepared.settings
    return settings.num_samples, settings.seq_len


def _with_size(prepared: Prepared, samples: int, length: int) -> Prepared:
    """`prepared` with so many windows of so many tokens, whatever their text."""
    assert prepared.windows is not None
    windows = Windows(prepared.windows.calibration[:samples, :length], prepared.windows.heldout[:, :length])
    return replace(prepared, windows=windows, settings=replace(prepared.settings, num_samples=samples, seq_len=length))


def fitting(prepared: Prepared, budget: float) -> tuple[int, int]:
    """The windows, and tokens in each, with which the job takes about `budget` seconds at most.

    Windows are halved first, then their lengths; those of `prepared` are the most. Raises UsageError if even the least
    takes longer, or if the method reads no text.
    """
    if prepared.windows is None or not len(prepared.windows.calibration):
        raise UsageError(
            f"--time-budget chooses how much text is read, and {prepared.settings.method.name} reads none here",
            hint="leave it out",
        )
    heldout = len(prepared.windows.heldout)
    log.info(f"time budget: the first block is run on {FEW[0]} windows, then on {FEW[1]}")
    few, more, checked = (_first_block(prepared, *counts) for counts in ((FEW[0], 1), (FEW[1], 1), (FEW[0], FEW[1])))
    length = prepared.settings.seq_len
    a_token = max(0.0, more - few) / ((FEW[1] - FEW[0]) * length)
    a_heldout = max(0.0, checked - few) / ((FEW[1] - 1) * length)
    alone = max(0.0, few - (a_token * FEW[0] + a_heldout) * length)  # whatever the tokens
    processes = _processes(prepared, Blocks())
    if not prepared.settings.method.undivided:  # most of it is solving
        alone /= processes
    others = [stage for stage in prepared.stages if not isinstance(stage, Blocks)]
    predicted = float("inf")
    for samples, length in _sizes(*_size(prepared)):
        smaller = replace(_with_size(prepared, samples, length), stages=tuple(others))
        blocks = alone + (a_token * samples + a_heldout * heldout) * length / processes
        predicted = blocks * len(prepared.discovery.blocks) + expected_seconds(smaller)
        if predicted <= budget:
            log.info(f"time budget: {samples} windows of {length} tokens, about {in_words(predicted)}")
            return samples, length
    raise UsageError(
        f"--time-budget: even {samples} windows of {length} tokens take about {in_words(predicted)} on this machine",
        hint="give more time, or use --preset fast, which reads no text",
    )


def _sizes(samples: int, length: int) -> Iterator[tuple[int, int]]:
    """What a budget may choose, the most first."""
    yield samples, length
    while samples > LEAST_SAMPLES:
        samples = max(LEAST_SAMPLES, samples // 2)
        yield samples, length
    while length > LEAST_SEQ_LEN:
        length = max(LEAST_SEQ_LEN, length // 2)
        yield samples, length


def _first_block(prepared: Prepared, samples: int, heldout: int) -> float:
    """Seconds that the first block takes on so many windows, in a job of its own that leaves nothing."""
    stage = Blocks()
    small = replace(_with_size(prepared, samples, prepared.settings.seq_len), stages=(stage,), head=())
    assert small.windows is not None
    small = replace(small, windows=replace(small.windows, heldout=small.windows.heldout[:heldout]))
    with tempfile.TemporaryDirectory() as folder, own_notes():
        job = Job(small, JobState(Path(folder) / "first", {}, small.spec()))
        try:
            if "gradients" in small.settings.method.needs:
                linears = small.discovery.of_block(0)
                ones = {one.name: torch.ones(one.out_features, one.in_features) for one in linears}
                job.state.save_tensors(sensitivity(0), ones)
            stage.begin(job)
            began = time.perf_counter()
            stage.run_block(job, 0, solve=True)
            return time.perf_counter() - began
        finally:
            job.chains.close()
            job.state.close()
