"""A part of an unfinished job that is not what was written is never used: it is named, and made again once deleted."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from job_helpers import ANYPRECISION, digests, run

from bitstrata.checkpoint import is_checkpoint
from bitstrata.errors import JobError
from bitstrata.planes import PlaneWeight
from bitstrata.quantization.context import Job
from bitstrata.quantization.stages import Measure
from bitstrata.quantization.state import JobState, Part

# jobs that leave every kind of part: blocks, tuned scales, head and embedding, sensitivities
TUNED = {
    "method": "nested", "preset": "best", "options": {"iterations": 1, "tune_steps": 2}, "head_bits": 4,
}  # fmt: skip
JOBS: dict[str, dict[str, Any]] = {"tuned": TUNED, "sensitivities": {**ANYPRECISION, "bits": "2,3"}}


class StoppedError(Exception):
    """Stands for whatever ends a process early."""


def stop_before_measuring(patch: pytest.MonkeyPatch) -> None:
    def stop(self: Measure, job: Job) -> None:
        raise StoppedError

    patch.setattr(Measure, "run", stop)


def stop_before_the_last_block(patch: pytest.MonkeyPatch) -> None:
    """Sensitivities are there for blocks that are still to be solved."""
    save = JobState.save

    def stop(self: JobState, block: Part, weights: dict[str, PlaneWeight]) -> None:
        if block == 2:
            raise StoppedError
        save(self, block, weights)

    patch.setattr(JobState, "save", stop)


def flip(path: Path, draw: random.Random) -> None:
    """Flip one bit anywhere in a file."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


@pytest.mark.parametrize("job", JOBS)
def test_one_flipped_bit_in_any_part_is_found(job: str, model: Path, text: Path, tmp_path: Path, seed: int) -> None:
    settings, draw = JOBS[job], random.Random(seed)
    run(model, tmp_path / "unbroken", text, **settings)
    expected = digests(tmp_path / "unbroken")
    with pytest.MonkeyPatch.context() as patch:
        (stop_before_measuring if job == "tuned" else stop_before_the_last_block)(patch)
        with pytest.raises(StoppedError):
            run(model, tmp_path / "stopped", text, **settings)
    parts = sorted(path.name for path in (tmp_path / "stopped" / ".job").glob("*.safetensors"))
    kinds = {name.split("-")[0].removesuffix(".safetensors") for name in parts}
    assert kinds == ({"block", "refined", "head", "embedding"} if job == "tuned" else {"block", "fisher"})
    for kind in sorted(kinds):
        output = Path(shutil.copytree(tmp_path / "stopped", tmp_path / kind))
        part = output / ".job" / draw.choice([name for name in parts if name.startswith(kind)])
        flip(part, draw)
        for _ in range(2):
            with pytest.raises(JobError, match="is damaged") as caught:
                run(model, output, text, **settings)
            assert str(part) in caught.value.message
            assert "delete that file" in (caught.value.hint or "")
            assert not is_checkpoint(output)
        part.unlink()
        run(model, output, text, **settings)
        assert digests(output) == expected, part.name


def test_a_part_that_is_damaged_after_it_was_used_is_found_before_it_is_published(
    model: Path, text: Path, tmp_path: Path, seed: int
) -> None:
    measure, output = Measure.run, tmp_path / "out"

    def damage(self: Measure, job: Job) -> None:
        measure(self, job)
        flip(output / ".job" / "block-0001.safetensors", random.Random(seed))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Measure, "run", damage)
        with pytest.raises(JobError, match=r"block-0001\.safetensors is damaged"):
            run(model, output, text)
    assert not is_checkpoint(output)
    assert not list(output.glob("*.safetensors"))


@pytest.mark.parametrize("length", [0, 7, 31, 32, 33])
def test_a_part_that_was_cut_short_is_found(length: int, model: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        stop_before_measuring(patch)
        with pytest.raises(StoppedError):
            run(model, output, text, method="rtn", options={})
    (output / ".job" / "block-0000.safetensors").write_bytes(b"\0" * length)
    with pytest.raises(JobError, match=r"block-0000\.safetensors is damaged"):
        run(model, output, text, method="rtn", options={})


def test_tuned_scales_are_stored_without_the_planes_again(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_before_measuring(patch)
        with pytest.raises(StoppedError):
            run(model, tmp_path / "out", text, **TUNED)
    for block in range(3):
        solved, tuned = (
            (tmp_path / "out" / ".job" / f"{kind}-{block:04d}.safetensors").read_bytes()
            for kind in ("block", "refined")
        )
        assert b".plane_0" in solved
        assert b".plane_" not in tuned
        assert b".offset_2" in tuned
