"""A resumed job goes on from the chains on disk; where they are missing or damaged it passes the blocks once more."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job_helpers import ANYBCQ, digests, run
from job_process import arguments, finish, start
from torch import Tensor, nn

from bitstrata.calibration import BlockRunner
from bitstrata.quantization.stages import Blocks
from bitstrata.quantization.state import JobState

NESTED: dict[str, Any] = {"method": "nested", "options": {"iterations": 2}}
METHODS = pytest.mark.parametrize("method", [NESTED, ANYBCQ], ids=lambda method: method["method"])


class InterruptedJobError(Exception):
    """Stands for whatever ends a process early."""


def interrupted(model: Path, text: Path, output: Path, after: int, method: dict[str, Any]) -> None:
    """Leave a job in `output` that has finished so many blocks."""
    save, saved = JobState.save, 0

    def save_and_stop(self: JobState, block: Any, weights: Any) -> None:
        nonlocal saved
        save(self, block, weights)
        saved += 1
        if saved == after:
            raise InterruptedJobError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobState, "save", save_and_stop)
        with pytest.raises(InterruptedJobError):
            run(model, output, text, **method)


def calls_of(model: Path, text: Path, output: Path, method: dict[str, Any]) -> Counter[int]:
    """How often a job calls each block, after preflight has tried the first."""
    calls: Counter[int] = Counter()
    call, check = BlockRunner.call, BlockRunner.check

    def counted(self: BlockRunner, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        calls[index] += 1
        return call(self, index, block, hidden)

    def checked(self: BlockRunner, window: Tensor) -> None:
        check(self, window)
        calls.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockRunner, "call", counted)
        patch.setattr(BlockRunner, "check", checked)
        run(model, output, text, **method)
    return calls


def chains(output: Path) -> list[Path]:
    return sorted((output / ".job").glob("chain-*"))


@METHODS
@pytest.mark.parametrize("after", [1, 2, 3])
def test_no_finished_block_is_run_again(
    method: dict[str, Any], after: int, model: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = calls_of(model, text, tmp_path / "whole", method)
    assert set(whole) == {0, 1, 2}
    interrupted(model, text, tmp_path / "out", after, method)
    assert chains(tmp_path / "out")
    caplog.clear()
    calls = calls_of(model, text, tmp_path / "out", method)
    assert set(calls) == set(range(after, 3))
    assert "missing or damaged" not in caplog.text
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


TUNED: dict[str, Any] = {"method": "nested", "options": {"iterations": 1, "tune_steps": 2, "tune_tokens": 64}}


@pytest.mark.parametrize("moment", ["tuned-one", "refined-one", "refined-all"])
def test_no_block_is_run_again_for_the_tuning(
    moment: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever of it is done: the original's hidden states behind the last block lie there as long as it needs them."""
    run(model, tmp_path / "whole", text, **TUNED)
    method = "save_tensors" if moment == "tuned-one" else "save_refined"
    save, saves = getattr(JobState, method), 0

    def save_and_stop(self: JobState, *arguments: Any) -> None:
        nonlocal saves
        save(self, *arguments)
        saves += 1
        if saves == (3 if moment == "refined-all" else 1):
            raise InterruptedJobError

    with monkeypatch.context() as patch:
        patch.setattr(JobState, method, save_and_stop)
        with pytest.raises(InterruptedJobError):
            run(model, tmp_path / "out", text, **TUNED)
    assert (tmp_path / "out" / ".job" / "chain-0003-learning-original").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Blocks, "run_block", lambda *_, **__: pytest.fail("a block is run again"))
        run(model, tmp_path / "out", text, **TUNED)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_tuning_whose_targets_are_damaged_ends_in_the_same_bytes(
    model: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(model, tmp_path / "whole", text, **TUNED)
    interrupted(model, text, tmp_path / "out", 3, TUNED)
    turn_a_bit([tmp_path / "out" / ".job" / "chain-0003-learning-original"])
    caplog.clear()
    run(model, tmp_path / "out", text, **TUNED)
    assert "hidden states are missing or damaged; they pass the finished blocks again" in caplog.text
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def remove_one(files: list[Path]) -> None:
    files[len(files) // 2].unlink()


def remove_all(files: list[Path]) -> None:
    for path in files:
        path.unlink()


def turn_a_bit(files: list[Path]) -> None:
    data = bytearray(files[-1].read_bytes())
    data[len(data) // 3] ^= 4
    files[-1].write_bytes(data)


def cut_off(files: list[Path]) -> None:
    files[0].write_bytes(files[0].read_bytes()[:-100])


@pytest.mark.parametrize("damage", [remove_one, remove_all, turn_a_bit, cut_off])
def test_without_whole_chains_the_bytes_are_the_same(
    damage: Callable[[list[Path]], None],
    model: Path,
    text: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    method = ANYBCQ if damage is remove_all else NESTED
    run(model, tmp_path / "whole", text, **method)
    interrupted(model, text, tmp_path / "out", 2, method)
    damage([path for path in chains(tmp_path / "out") if "-0002-" in path.name])
    caplog.clear()
    run(model, tmp_path / "out", text, **method)
    assert "hidden states are missing or damaged; they pass the finished blocks again" in caplog.text
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_files_of_chains_are_few_and_gone_in_the_end(model: Path, text: Path, tmp_path: Path) -> None:
    interrupted(model, text, tmp_path / "out", 2, NESTED)
    places = Counter(path.name.split("-")[1] for path in chains(tmp_path / "out"))
    assert places == {"0001": 4 + 7, "0002": 4 + 7}  # before and behind the block that was saved
    run(model, tmp_path / "out", text, **NESTED)
    assert not (tmp_path / "out" / ".job").exists()
    assert not list((tmp_path / "out").glob("**/chain-*"))


@pytest.mark.slow
def test_killed_again_and_again_at_random_moments(model: Path, text: Path, tmp_path: Path, seed: int) -> None:
    """One job that is killed until it has nothing left to do."""
    draw, log = random.Random(seed), tmp_path / "log"
    assert finish(arguments(model, tmp_path / "whole", text), log) == 0, log.read_text()
    for number in range(40):
        process = start(arguments(model, tmp_path / "out", text), log)
        process.join(draw.uniform(0.02, 0.5) * (1 + number / 10))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
    assert finish(arguments(model, tmp_path / "out", text), log) == 0, log.read_text()
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
