"""A source that changes while a job reads it never ends in a result that says it was made from another one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job_helpers import RTN, digests, run
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

from bitstrata.checkpoint import is_checkpoint
from bitstrata.errors import JobError
from bitstrata.models import SourceModel
from bitstrata.quantization import job
from bitstrata.quantization.context import Job
from bitstrata.quantization.stages import Blocks
from bitstrata.quantization.state import JobState


@pytest.fixture
def source(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "source"))


def replace_weights(source: Path) -> None:
    """Another model under the same name, as a second download would put there."""
    weights = load_file(source / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, source / "new", {"format": "pt"})
    os.replace(source / "new", source / "model.safetensors")


def overwrite_weights(source: Path) -> None:
    """A few bytes changed in place: the size and the file stay."""
    with open(source / "model.safetensors", "r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"\x3c" * 400)


def overwrite_config(source: Path) -> None:
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


CHANGES = [replace_weights, overwrite_weights, overwrite_config]


def before_block(number: int) -> Callable[[pytest.MonkeyPatch, Callable[[], None]], None]:
    def install(patch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
        run_block = Blocks.run_block

        def changed(self: Blocks, job: Job, index: int, *, solve: bool) -> None:
            if index == number:
                change()
            run_block(self, job, index, solve=solve)

        patch.setattr(Blocks, "run_block", changed)

    return install


def after_preflight(patch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    state = JobState.__init__
    patch.setattr(JobState, "__init__", lambda *a, **k: (change(), state(*a, **k))[1])


def before_the_result_is_written(patch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    assemble = job._assemble
    patch.setattr(job, "_assemble", lambda *arguments: (change(), assemble(*arguments)))


MOMENTS = {
    "after preflight": after_preflight,
    "before the first block": before_block(0),
    "before the last block": before_block(2),
    "before the result is written": before_the_result_is_written,
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_change_is_refused_by_name(moment: str, change: Callable[[Path], None], source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(source, tmp_path / "expected", None, **RTN)
    original = Path(shutil.copytree(source, tmp_path / "original" / source.name))
    with pytest.MonkeyPatch.context() as patch:
        MOMENTS[moment](patch, lambda: change(source))
        with pytest.raises(JobError, match="changed while it was being read") as caught:
            run(source, output, None, **RTN)
    changed = "config.json" if change is overwrite_config else "model.safetensors"
    assert str(source / changed) in caught.value.message
    assert "put back what it was" in (caught.value.hint or "")
    assert not is_checkpoint(output)
    # once the original is back, the job goes on, and nothing of the other model is in the result
    run(original, output, None, **RTN)
    assert digests(output) == digests(tmp_path / "expected")


def test_a_tensor_that_changes_while_it_is_copied_is_not_made_durable(source: Path, tmp_path: Path) -> None:
    opened, reading = SourceModel._open, "model.layers.1.mlp.up_proj.weight"
    read = SourceModel.read
    times = []

    def open_and_change(self: SourceModel, file: str) -> Any:
        found = opened(self, file)
        if times:
            times.pop()
            overwrite_weights(source)
        return found

    def noted(self: SourceModel, stored: str) -> Any:
        self.spec(stored)
        if stored == reading:
            times[:] = [0]
        return read(self, stored)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SourceModel, "_open", open_and_change)
        patch.setattr(SourceModel, "read", noted)
        with pytest.raises(JobError, match="changed while it was being read"):
            run(source, tmp_path / "out", None, **RTN)
    assert [path.name for path in (tmp_path / "out" / ".job").glob("*.safetensors")] == ["block-0000.safetensors"]


def test_a_file_that_was_only_touched_is_the_same(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "expected", None, **RTN)

    def touch() -> None:
        for file in ("model.safetensors", "config.json"):
            shutil.copy(source / file, tmp_path / "copy")
            os.replace(tmp_path / "copy", source / file)

    with pytest.MonkeyPatch.context() as patch:
        before_block(1)(patch, touch)
        run(source, tmp_path / "out", None, **RTN)
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")


def test_a_change_during_preflight_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked for finite weights first, digested then: both must be of one file."""
    digest = SourceModel.digests
    monkeypatch.setattr(SourceModel, "digests", lambda self: (replace_weights(source), digest(self))[1])
    with pytest.raises(JobError, match="changed while it was being read"):
        run(source, tmp_path / "out", None, **RTN)
    assert not (tmp_path / "out").exists()


def test_shards_are_watched_one_by_one(tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "whole"))
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    source = SourceModel(tmp_path / "sharded")
    source.digests()
    source.check_unchanged()
    last = sorted((tmp_path / "sharded").glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes() + b"\0")
    with pytest.raises(JobError, match=last.name):
        source.check_unchanged()
