"""What a job says of its time before it begins, and what it does where a time is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from job_helpers import ANYBCQ, digests, run
from sparse_models import sparse_llama
from tiny_models import tiny_text

from bitstrata import arguments
from bitstrata.errors import PreflightError, UsageError
from bitstrata.models import SourceModel
from bitstrata.progress import in_words
from bitstrata.quantization import budget, duration, preflight
from bitstrata.quantization import job as job_module
from bitstrata.quantization.state import JobState
from bitstrata.solvers import make_method

NESTED: dict[str, Any] = {"method": "nested", "options": {"iterations": 1, "sweeps": 1}, "num_samples": 48}


class StoppedError(Exception):
    """Stands for whatever ends a process early."""


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30min", 1800), ("2h", 7200), ("1h30min", 5400), ("0.5h", 1800), ("3m", 180)]
)
def test_times_as_people_write_them(text: str, seconds: float) -> None:
    assert arguments.duration("--time-budget", text) == seconds


@pytest.mark.parametrize("text", ["", "30", "h", "-2h", "0s", "2 weeks", "1e3s", "2h of work", 30, None])
def test_what_is_no_time_is_refused_in_words(text: object) -> None:
    with pytest.raises(UsageError, match=r"--time-budget .* is not a time") as caught:
        arguments.duration("--time-budget", text)
    assert "30min" in (caught.value.hint or "")


def test_a_bad_time_is_one_of_the_problems(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(PreflightError) as caught:
        run(model, tmp_path / "out", text, time_budget="soon", seq_len=1, **NESTED)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (41.4, "41 s"), (1320, "22 min"), (5400, "1.5 h"), (4e4, "11 h"), (4e5, "5 days")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which a block takes a second and half a one more for each window of 32 tokens; the rest nothing."""
    monkeypatch.setattr(duration, "_first_block", lambda prepared, *windows: 1 + sum(windows) / 2)
    monkeypatch.setattr(duration, "expected_seconds", lambda prepared: 0.0)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("given", "found"),
    # three blocks of 1 + (samples + 16) / 2 seconds
    [("200s", (48, 32)), ("99s", (48, 32)), ("98s", (24, 32)), ("63s", (24, 32)), ("62s", (16, 32))],
)
def test_the_most_text_that_fits_is_taken(
    given: str, found: tuple[int, int], model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = tiny_text(tmp_path / "text.txt", words=4000)
    report = run(model, tmp_path / "out", text, time_budget=given, dry_run=True, **NESTED)
    assert f"time budget: calibrated on {found[0]} windows of {found[1]} tokens" in report.notes


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("method", "given", "found"),
    # three blocks of (1 + (samples + 16) / 2) / 2 seconds; what the first process does alone is not divided
    [
        (NESTED, "50s", 48),
        (NESTED, "49s", 24),
        (NESTED, "32s", 24),
        (NESTED, "31s", 16),
        (ANYBCQ, "50s", 24),
        (ANYBCQ, "51s", 48),
    ],
)
def test_several_processes_divide_the_time(
    method: dict[str, Any], given: str, found: int, model: Path, tmp_path: Path
) -> None:
    text = tiny_text(tmp_path / "text.txt", words=4000)
    changes = {"time_budget": given, "dry_run": True, "device": "auto", "devices": "cpu,cpu", "num_samples": 48}
    report = run(model, tmp_path / "out", text, **{**method, **changes})
    assert f"time budget: calibrated on {found} windows of 32 tokens" in report.notes


def test_the_speed_is_measured_with_the_threads_of_one_process(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def first_block(*_: Any) -> float:
        found.append(torch.get_num_threads())
        return 1.0

    monkeypatch.setattr(duration, "_first_block", first_block)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        budgeted = {**NESTED, "time_budget": "1h", "dry_run": True, "device": "auto"}
        run(model, tmp_path / "out", text, devices="cpu,cpu", **budgeted)
        run(model, tmp_path / "out", text, **budgeted)
        assert found == [2] * 3 + [4] * 3
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("clock")
def test_windows_get_shorter_when_there_are_few(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duration, "LEAST_SAMPLES", 4)
    monkeypatch.setattr(duration, "LEAST_SEQ_LEN", 8)
    report = run(model, tmp_path / "out", text, time_budget="20s", dry_run=True, **NESTED)
    # 1 + 16 windows of which 4 are learnt from: 10 s at 32 tokens a window, 5 s at 16
    assert "time budget: calibrated on 4 windows of 16 tokens" in report.notes


@pytest.mark.usefixtures("clock")
def test_a_time_that_nothing_fits_is_refused_with_the_least_there_is(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"even \d+ windows of 32 tokens take about \d+ s") as caught:
        run(model, tmp_path / "out", text, time_budget="10s", **NESTED)
    assert "--preset fast" in (caught.value.problems[0].hint or "")
    assert list(tmp_path.iterdir()) == []


def test_a_budget_for_what_reads_no_text_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="chooses how much text is read"):
        run(model, tmp_path / "out", None, time_budget="1h", method="rtn", options={})


def test_a_resumed_job_does_not_choose_again(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first block is really run here, and where it leads to does not matter: it is made up."""
    measured = []

    def fitting(prepared: Any, seconds: float) -> tuple[int, int]:
        measured.append([duration._first_block(prepared, samples, 1) for samples in (1, 2)])
        return 5, 24

    monkeypatch.setattr(budget, "fitting", fitting)
    whole = run(model, tmp_path / "whole", text, time_budget="1h", **NESTED)
    assert min(measured[0]) > 0
    save = JobState.save

    def save_and_stop(self: JobState, block: Any, weights: Any) -> None:
        save(self, block, weights)
        if block == 1 and "first" not in self.folder.parts:
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(JobState, "save", save_and_stop)
        with pytest.raises(StoppedError):
            run(model, tmp_path / "out", text, time_budget="1h", **NESTED)
    job = json.loads((tmp_path / "out" / ".job" / "job.json").read_text())
    assert (job["num_samples"], job["seq_len"]) == (5, 24)
    assert len(measured) == 2
    again = run(model, tmp_path / "out", text, time_budget="2h", **NESTED)
    assert len(measured) == 2, "nothing was measured"
    assert again.notes == whole.notes
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    run(model, tmp_path / "out", text, time_budget="2h", **NESTED)  # already done: nothing is measured either
    assert len(measured) == 2


def test_seventy_billion_weights_are_judged_without_reading_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = sparse_llama(tmp_path / "model", "70B")
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size > 140e9
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) < 10e6, "no bytes on the disk"
    monkeypatch.setattr(preflight, "free_memory", lambda device: 1 << 50)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 50}))
    for name in ("map", "read", "rows", "digests"):
        monkeypatch.setattr(SourceModel, name, lambda *_: pytest.fail("weights are read"))
    text = tiny_text(tmp_path / "text.txt", words=4000)
    run(folder, tmp_path / "out", text, dry_run=True, num_samples=64, seq_len=64, method="nested", options={})
    said = caplog.messages[-1]
    for part in (
        "560 layers",
        "on this machine",
        "of memory",
        "of disk",
        "weights were not read",
        "nothing was written",
    ):
        assert part in said, said
    assert not (tmp_path / "out").exists()


def test_a_machine_that_is_too_small_is_told_what_it_would_take(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preflight, "free_memory", lambda device: 1000)
    with pytest.raises(PreflightError, match="of memory"):
        run(model, tmp_path / "out", text, dry_run=True, **NESTED)
    assert any("on this machine" in message for message in caplog.messages)


def test_the_first_block_corrects_what_was_expected(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The blocks take what the first one took, the other stages what they were expected to."""
    told: list[str] = []
    monkeypatch.setattr(duration, "operations_a_second", lambda device, dtype: 1e6)
    monkeypatch.setattr(duration, "LESS", (4, 16))
    monkeypatch.setattr(duration, "LONG", 0.0)
    corrected = duration.corrected

    def correct(prepared: Any, seconds: float) -> str:
        assert seconds > 0
        others = duration.expected_seconds(prepared, 0.0)
        told.append(corrected(prepared, 1000.0))
        blocks = len(prepared.discovery.blocks)
        assert f"about {in_words(others + 1000.0 * blocks)} in all" in told[0]
        return told[0]

    monkeypatch.setattr(job_module, "corrected", correct)
    caplog.set_level("INFO", logger="bitstrata")
    run(model, tmp_path / "out", text, **NESTED)
    assert len(told) == 1, "once, by the first block"
    assert told[0] in caplog.text
    assert "; with --num-samples 4 --seq-len 16 about" in told[0]


@pytest.mark.parametrize("options", [{"iterations": 4}, {"sweeps": 4}], ids=str)
def test_more_rounds_are_expected_to_take_longer(options: dict[str, int]) -> None:
    few, more = (make_method("nested", "default", {"iterations": 1, "sweeps": 1, **o}) for o in ({}, options))
    assert more.operations(64, 32, (2, 3)) > few.operations(64, 32, (2, 3)) > few.operations(64, 32, (2,))


def test_what_reads_no_text_is_not_counted_by_its_rounds() -> None:
    assert make_method("nested", "fast", {}).operations(64, 32, (2,)) == 0
    assert make_method("anybcq", "default", {"steps": 3, "batch_size": 2}).learnt_tokens(8, (2, 3)) == 3 * 2 * 8 * 2
