"""kill -9 at any moment, run the same command again: the output is the same, byte for byte."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from job_helpers import digests
from job_process import arguments, finish, start

from bitstrata.checkpoint import is_checkpoint, validate

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def unbroken(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float]:
    """Digests of what an undisturbed process writes, and the seconds it takes."""
    folder = tmp_path_factory.mktemp("unbroken")
    warm_up = finish(arguments(model, folder / "warm-up", text), folder / "log")
    began = time.monotonic()
    code = finish(arguments(model, folder / "out", text), folder / "log")
    assert (warm_up, code) == (0, 0), (folder / "log").read_text()
    return digests(folder / "out"), time.monotonic() - began


# fingerprint, blocks, tuned precisions, tuned blocks, copies of tokenizer files, shards, and index, report, config
GROUPS = (1, 3, 2, 3, 3, 6, 3)
FIRSTS = [sum(GROUPS[:at]) for at in range(len(GROUPS))]
MOMENTS = [
    pytest.param([*FIRSTS, sum(GROUPS)], id="each-kind-of-file"),
    pytest.param(sorted(set(range(sum(GROUPS))) - set(FIRSTS)), id="the-others", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("moments", MOMENTS)
def test_killed_at_files_in_turn(
    moments: list[int], model: Path, text: Path, tmp_path: Path, unbroken: tuple[dict[str, str], float]
) -> None:
    """Killed when the n-th file is written but not yet in its place; and right after the last."""
    log, files = tmp_path / "log", sum(GROUPS)
    for file in moments:
        last = file == files
        output = tmp_path / f"out-{file}"
        command = arguments(model, output, text)
        assert finish(command, log, kill_at=2 * file - last) == KILLED, log.read_text()
        assert is_checkpoint(output) == last, f"killed at file {file}: is the model whole?"
        assert finish(command, log) == 0, log.read_text()
        assert digests(output) == unbroken[0], f"killed at file {file}"


@pytest.mark.slow
def test_killed_at_ten_random_moments(
    model: Path, text: Path, tmp_path: Path, unbroken: tuple[dict[str, str], float], seed: int
) -> None:
    expected, seconds = unbroken
    draw, log = random.Random(seed), tmp_path / "log"
    for number in range(10):
        output = tmp_path / f"out-{number}"
        moment = seconds * (number + draw.random()) / 10
        process = start(arguments(model, output, text), log)
        process.join(moment)
        process.kill()
        process.join()
        assert process.exitcode in (KILLED, 0), log.read_text()
        if is_checkpoint(output):
            assert validate(output) == [], "what looks whole is whole"
        assert finish(arguments(model, output, text), log) == 0, log.read_text()
        assert digests(output) == expected, f"killed after {moment:.3f} of {seconds:.3f} s"


def test_one_job_killed_again_and_again(
    model: Path, text: Path, tmp_path: Path, unbroken: tuple[dict[str, str], float]
) -> None:
    log, output = tmp_path / "log", tmp_path / "out"
    command = arguments(model, output, text)
    for blocks in range(4):  # each run gets one file further: the fingerprint, then the blocks
        assert finish(command, log, kill_at=1) == KILLED, log.read_text()
        assert len(list(output.glob(".job/block-*.safetensors"))) == blocks
    for moment in (0, 5, 10, 15):  # the checkpoint is put together anew each time
        assert finish(command, log, kill_at=moment) == KILLED, log.read_text()
        assert not is_checkpoint(output)
    assert finish(command, log) == 0, log.read_text()
    assert digests(output) == unbroken[0]


@pytest.mark.slow
def test_a_process_of_its_own_killed_in_the_middle(model: Path, text: Path, tmp_path: Path) -> None:
    """The program as a user starts it, with nothing shared with this process."""
    output, whole = tmp_path / "killed", tmp_path / "whole"
    slower = ["--option", "tune_steps=200"]
    command = [sys.executable, "-m", "bitstrata.cli.main", *arguments(model, output, text), *slower]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while not list(output.glob(".job/block-*.safetensors")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        process.kill()
        assert process.wait() == KILLED
    assert not is_checkpoint(output)
    subprocess.run(command, check=True, capture_output=True)
    assert finish([*arguments(model, whole, text), *slower], tmp_path / "log") == 0
    assert digests(output) == digests(whole)


def test_a_second_process_is_refused_while_the_first_works(
    model: Path, text: Path, tmp_path: Path, unbroken: tuple[dict[str, str], float]
) -> None:
    """The first is stopped in its tracks, so that it surely still holds the folder."""
    log, second_log = tmp_path / "log", tmp_path / "second.log"
    command = [*arguments(model, tmp_path / "out", text), "--option", "tune_steps=2000"]
    process = start(command, log)
    assert process.pid is not None
    while not list(tmp_path.glob("out/.job/job.json")):
        assert process.is_alive(), log.read_text()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGSTOP)
    assert finish(command, second_log) == 3
    assert "another process is quantizing into" in second_log.read_text()
    assert "hint:" in second_log.read_text()
    process.kill()  # and its lock goes with it
    process.join()
    assert finish(arguments(model, tmp_path / "out", text), second_log) == 3
    assert "options.tune_steps was 2000, is now 4" in second_log.read_text()
