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


def test_killed_at_every_file_in_turn(
    model: Path, text: Path, tmp_path: Path, unbroken: tuple[dict[str, str], float]
) -> None:
    """One job, killed just before and just after each rename of a file it makes, started again each time."""
    log = tmp_path / "log"
    for file in range(1 + 3 + 6 + 3):  # fingerprint, blocks, shards, and index, report, config
        for after in (0, 1):
            output = tmp_path / f"out-{file}-{after}"
            command = arguments(model, output, text)
            assert finish(command, log, kill_at=2 * file + after) == KILLED, log.read_text()
            last = file == 12 and after
            assert is_checkpoint(output) == bool(last), f"killed at file {file}: is it whole?"
            if file % 4 == 3 or last:  # the other half-made jobs go on below, each killed once more
                assert finish(command, log) == 0, log.read_text()
                assert digests(output) == unbroken[0], f"killed at file {file}, after={after}"


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


@pytest.mark.slow
def test_one_job_killed_again_and_again(
    model: Path, text: Path, tmp_path: Path, unbroken: tuple[dict[str, str], float]
) -> None:
    """Every run gets as far as one more file, then is killed; nothing that was durable is lost."""
    log, command = tmp_path / "log", arguments(model, tmp_path / "out", text)
    kills = 0
    while finish(command, log, kill_at=1) == KILLED:  # after the first file that this run renames
        kills += 1
        assert kills < 40, "the job makes no progress"
    # fingerprint and three blocks one a run; the checkpoint is assembled anew each time, so it ends only unkilled
    assert digests(tmp_path / "out") == unbroken[0]


@pytest.mark.slow
def test_a_process_of_its_own_killed_in_the_middle(model: Path, text: Path, tmp_path: Path) -> None:
    """The program as a user starts it, on two threads, with nothing shared with this process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    program = [sys.executable, "-m", "bitstrata.cli.main"]
    output, whole = tmp_path / "killed", tmp_path / "whole"
    command = [*arguments(model, output, text), "--option", "steps=400"]
    process = subprocess.Popen([*program, *command], env=environment, stderr=subprocess.PIPE)
    while not list(output.glob(".job/block-*.safetensors")):
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    process.kill()
    assert process.wait() == KILLED
    assert not is_checkpoint(output)
    for folder in (output, whole):
        command = [*arguments(model, folder, text), "--option", "steps=400"]
        subprocess.run([*program, *command], env=environment, check=True, capture_output=True)
    assert digests(output) == digests(whole)


def test_a_second_process_is_refused_while_the_first_works(
    model: Path, text: Path, tmp_path: Path, unbroken: tuple[dict[str, str], float]
) -> None:
    """The first is stopped in its tracks, so that it surely still holds the folder."""
    log, second_log = tmp_path / "log", tmp_path / "second.log"
    command = [*arguments(model, tmp_path / "out", text), "--option", "steps=2000"]
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
    assert "options.steps was 2000, is now 10" in second_log.read_text()
