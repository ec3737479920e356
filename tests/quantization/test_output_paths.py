"""Output folders that cannot be are refused before anything is computed; what the system refuses later is explained."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from job_helpers import RTN, digests, run

import bitstrata
from bitstrata.checkpoint import is_checkpoint
from bitstrata.errors import PreflightError, ResourceError, UsageError
from bitstrata.models import SourceModel
from bitstrata.quantization.stages import Blocks


@pytest.fixture(autouse=True)
def nothing_is_computed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "refused" in request.node.name:
        monkeypatch.setattr(Blocks, "run", lambda self, job: pytest.fail("the job began"))


def refused(model: Path, output: Path, said: str) -> str:
    with pytest.raises(PreflightError) as caught:
        run(model, output, None, **RTN)
    (problem,) = caught.value.problems
    assert isinstance(problem, UsageError)
    assert caught.value.exit_code == 2
    assert said in problem.message
    assert problem.hint
    assert len(problem.message) < 500
    return problem.message


@pytest.mark.parametrize("parts", [["a" * 256], ["é" * 128], ["a" * 5000], ["fine", "a" * 256], ["b" * 250] * 17])
def test_names_that_are_too_long_are_refused(parts: list[str], model: Path, tmp_path: Path) -> None:
    refused(model, tmp_path.joinpath(*parts), "cannot be used: File name too long")
    assert list(tmp_path.iterdir()) == []


def test_the_longest_name_that_fits_is_used(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / ("a" * 255), None, **RTN)
    assert is_checkpoint(tmp_path / ("a" * 255))


def test_a_name_with_a_zero_byte_is_refused(model: Path, tmp_path: Path) -> None:
    refused(model, tmp_path / "a\0b", "cannot be used")


def test_a_name_that_is_not_utf8_is_refused(model: Path, tmp_path: Path) -> None:
    refused(model, tmp_path / os.fsdecode(b"caf\xe9"), "is not UTF-8")
    refused(model, tmp_path / os.fsdecode(b"caf\xe9") / "out", "is not UTF-8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "deep/er"])
def test_a_link_to_nowhere_is_refused(below: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(model, tmp_path / "link" / below, f"{tmp_path / 'link'} is a link to {tmp_path / 'nowhere'}")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_link_to_itself_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "link")
    refused(model, tmp_path / "link", "Too many levels of symbolic links")


def test_a_link_to_a_folder_is_followed(model: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    run(model, tmp_path / "link", None, **RTN)
    run(model, tmp_path / "plain", None, **RTN)
    assert digests(tmp_path / "there") == digests(tmp_path / "plain")
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("name", ["lock", "job.json"])
def test_folders_in_the_places_of_our_files_are_refused_in_words(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / ".job" / name).mkdir(parents=True)
    with pytest.raises(bitstrata.BitstrataError) as caught:
        run(model, tmp_path / "out", None, **RTN)
    assert caught.value.exit_code in (2, 3)
    assert str(tmp_path / "out") in str(caught.value)


@pytest.fixture
def small_files() -> Iterator[int]:
    """No file of this process may be longer, as with `ulimit -f`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield 20_000
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_file_beyond_the_limit_is_no_traceback_and_nothing_is_lost(
    model: Path, tmp_path: Path, small_files: int
) -> None:
    assert sum(size for size in map(os.path.getsize, model.iterdir())) > small_files
    with pytest.raises(ResourceError, match="larger than a file may be here") as caught:
        run(model, tmp_path / "out", None, **RTN)
    assert caught.value.exit_code == 4
    assert "ulimit -f" in (caught.value.hint or "")
    assert not list(tmp_path.rglob("*-tmp")), "half a file was left"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    run(model, tmp_path / "out", None, **RTN)
    run(model, tmp_path / "plain", None, **RTN)
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")


def test_an_output_that_disappears_is_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, read = tmp_path / "out", SourceModel.read

    def vanish(self: SourceModel, stored: str) -> object:
        shutil.rmtree(output, ignore_errors=True)
        return read(self, stored)

    monkeypatch.setattr(SourceModel, "read", vanish)
    with pytest.raises(UsageError, match=r"cannot write .*block-0000.*No such file"):
        run(model, output, None, **RTN)
