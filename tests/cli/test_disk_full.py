"""A disk that runs full: exit code 4, a clear message, and the same command finishes once there is room."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from cli_outcome import Command
from job_helpers import digests

QUICK = ["--method", "bcq", "--option", "rounds=2", "--group-size", "32"]


def mount(folder: Path, size: str, *, again: bool = False) -> str | None:
    """Mount (or resize) a file system of `size` at `folder`; returns why it cannot be done."""
    options = f"size={size}" + (",remount" if again else "")
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
        )
    except OSError as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own, if this process may mount one."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    reason = mount(folder, "64k")
    if reason:
        pytest.skip(f"a small disk cannot be mounted: {reason}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from bitstrata.cli.main import run

    output = tmp_path_factory.mktemp("expected") / "out"
    assert run(["quantize", str(model), "-o", str(output), *QUICK]) == 0
    return digests(output)


def test_too_small_a_disk_is_found_before_anything_is_written(model: Path, disk: Path, cli: Command) -> None:
    outcome = cli("quantize", model, "-o", disk / "out", *QUICK)
    outcome.refused(4, "of disk", "are free", "nothing was written")
    assert list(disk.iterdir()) == []


class Usage(NamedTuple):
    """What `shutil.disk_usage` returns."""

    total: int
    used: int
    free: int


@pytest.mark.parametrize("kilobytes", [0, 4, 16, 32, 48, 64, 96, 128, 160, 192, 224])
def test_a_disk_that_fills_up_later_loses_nothing(
    kilobytes: int, model: Path, disk: Path, expected: dict[str, str], cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else takes the space that the preflight saw: the job stops at some file, whichever it is."""
    filler = disk / "filler"
    assert mount(disk, "512k", again=True) is None
    filler.write_bytes(b"\0" * (512 - kilobytes) * 1024)
    command = ["quantize", model, "-o", disk / "out", *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, 1 << 40))
        for _ in range(2):  # running it again changes nothing while the disk is full
            outcome = cli(*command)
            outcome.refused(4, "the disk is full: could not write", "run the same command again")
            assert not (disk / "out" / "config.json").exists()
            assert not list(disk.rglob("*-tmp")), "half a file was left"
    blocks = {path: path.stat().st_mtime_ns for path in disk.glob("out/.job/block-*")}
    filler.unlink()
    outcome = cli(*command)
    assert outcome.code == 0, outcome.err
    assert (f"resuming: {len(blocks)} of 2" in outcome.err) == bool(blocks)
    assert digests(disk / "out") == expected


def test_an_output_that_may_not_be_written_is_a_usage_error(model: Path, disk: Path, cli: Command) -> None:
    assert mount(disk, "4m,ro", again=True) is None
    outcome = cli("quantize", model, "-o", disk / "out", *QUICK)
    outcome.refused(2, f"cannot write {disk / 'out'}", "choose another output folder")
