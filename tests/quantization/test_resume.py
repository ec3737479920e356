"""An interrupted job continues where it was, to the same bytes; a different command is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from job_helpers import ANYBCQ, BCQ, digests, run
from safetensors.torch import load_file, save_file
from tiny_models import tiny_text

from bitstrata.checkpoint import is_checkpoint
from bitstrata.errors import JobError, PreflightError
from bitstrata.quantization import preflight
from bitstrata.quantization.state import JobState


class InterruptedJobError(Exception):
    """Stands for whatever ends a process early."""


@pytest.fixture(scope="module")
def unbroken(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the files that the job writes when nothing interrupts it."""
    output = tmp_path_factory.mktemp("unbroken") / "out"
    run(model, output, text)
    return digests(output)


def break_after(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    save = JobState.save

    def save_and_stop(self: JobState, index: int, weights: Any) -> None:
        save(self, index, weights)
        if index == block:
            raise InterruptedJobError

    monkeypatch.setattr(JobState, "save", save_and_stop)


def interrupted(model: Path, text: Path, output: Path, block: int = 0) -> None:
    """Leave a job in `output` that has finished `block` and those before it."""
    with pytest.MonkeyPatch.context() as patch:
        break_after(block, patch)
        with pytest.raises(InterruptedJobError):
            run(model, output, text)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_job_interrupted_after_a_block_ends_with_the_same_bytes(
    block: int, model: Path, text: Path, tmp_path: Path, unbroken: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out"
    interrupted(model, text, output, block)
    assert not is_checkpoint(output)
    finished = list((output / ".job").glob("block-*"))
    assert len(finished) == block + 1
    before = [path.stat().st_mtime_ns for path in finished]
    caplog.clear()
    with pytest.MonkeyPatch.context() as patch:
        solved: list[int] = []
        save = JobState.save
        patch.setattr(JobState, "save", lambda self, index, weights: (solved.append(index), save(self, index, weights)))
        patch.setattr(JobState, "finish", JobState.close)  # keep the job's files to look at
        run(model, output, text)
    assert f"resuming: {block + 1} of 3 blocks are already done" in caplog.text
    assert solved == list(range(block + 1, 3)), "a finished block was solved again"
    assert [path.stat().st_mtime_ns for path in finished] == before
    shutil.rmtree(output / ".job")
    assert digests(output) == unbroken


def test_a_job_interrupted_at_every_block_in_turn_ends_with_the_same_bytes(
    model: Path, text: Path, tmp_path: Path, unbroken: dict[str, str]
) -> None:
    for block in range(3):
        interrupted(model, text, tmp_path / "out", block)
        (tmp_path / "out" / "model-plane-7.safetensors.bitstrata-tmp").write_bytes(b"half a file")
    run(model, tmp_path / "out", text)
    assert digests(tmp_path / "out") == unbroken


CHANGES: dict[str, dict[str, Any]] = {
    "group_size": {"group_size": 16},
    "bits": {"bits": "2,3"},
    "method": BCQ,
    "options.steps": {"options": {**ANYBCQ["options"], "steps": 7}},
    "options.learning_rate": {"options": {**ANYBCQ["options"], "learning_rate": 0.1}},
    "preset": {"preset": "best"},
    "num_samples": {"num_samples": 7},
    "seq_len": {"seq_len": 31},
    "seed": {"seed": 1},
    "skip": {"skip": ("*.q_proj",)},
}


@pytest.fixture(scope="module")
def unfinished(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unfinished") / "out"
    interrupted(model, text, output)
    return output


@pytest.fixture(scope="module")
def finished(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "out"
    run(model, output, text)
    return output


@pytest.mark.parametrize("name", CHANGES)
def test_other_settings_are_refused_by_name(
    name: str, model: Path, text: Path, unfinished: Path, finished: Path
) -> None:
    for output, error in ((unfinished, JobError), (finished, PreflightError)):
        before = digests(output)
        with pytest.raises(error) as caught:
            run(model, output, text, **CHANGES[name])
        problem = caught.value if isinstance(caught.value, JobError) else caught.value.problems[0]
        assert f"{name} was " in problem.message
        assert "is now" in problem.message
        assert problem.hint
        assert digests(output) == before, "something was changed"


def other_text(model: Path, text: Path, folder: Path) -> tuple[Path, Path]:
    return model, tiny_text(folder / "text.txt", seed=1)


def other_weights(model: Path, text: Path, folder: Path) -> tuple[Path, Path]:
    copy = Path(shutil.copytree(model, folder / model.name))
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return copy, text


def other_config(model: Path, text: Path, folder: Path) -> tuple[Path, Path]:
    copy = Path(shutil.copytree(model, folder / model.name))
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    return copy, text


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (other_text, "text_sha256"),
        (other_weights, "model_sha256.model.safetensors"),
        (other_config, "model_sha256.config.json"),
    ],
)
def test_another_text_or_model_is_refused_by_name(
    change: Callable[..., tuple[Path, Path]],
    name: str,
    model: Path,
    text: Path,
    unfinished: Path,
    finished: Path,
    tmp_path: Path,
) -> None:
    changed_model, changed_text = change(model, text, tmp_path)
    for output, error in ((unfinished, JobError), (finished, PreflightError)):
        with pytest.raises(error) as caught:
            run(changed_model, output, changed_text)
        assert f"{name} was " in caught.value.message


def test_the_same_model_and_text_in_another_place_continue_the_job(
    model: Path, text: Path, tmp_path: Path, unbroken: dict[str, str]
) -> None:
    interrupted(model, text, tmp_path / "out", 1)
    moved = Path(shutil.copytree(model, tmp_path / "elsewhere" / model.name))
    copied = Path(shutil.copy(text, tmp_path / text.name))
    run(moved, tmp_path / "out", copied)
    assert digests(tmp_path / "out") == unbroken


def test_a_finished_output_has_nothing_to_do(
    model: Path, text: Path, finished: Path, unbroken: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    times = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    report = run(model, finished, text)
    assert "nothing to do" in caplog.text
    assert [row["bits"] for row in report.results] == [2, 3, 4]
    assert report.total_bytes == sum(path.stat().st_size for path in finished.iterdir())
    assert {path: path.stat().st_mtime_ns for path in finished.iterdir()} == times
    assert digests(finished) == unbroken


MEASURES = ("nll", "kld", "top1_agreement", "rtn")


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def edit_report(output: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = output / "bitstrata_report.json"
    saved = json.loads(path.read_text())
    change(saved)
    path.write_text(json.dumps(saved))


def test_a_report_of_a_newer_version_is_read_for_what_is_known(model: Path, text: Path, copied: Path) -> None:
    expected = run(model, copied, text)
    edit_report(copied, lambda saved: (saved.update(speed=3), [row.update(energy=1) for row in saved["results"]]))
    report = run(model, copied, text)
    assert report.saved() == expected.saved()
    assert str(report) == str(expected)


def test_a_report_of_an_older_version_lacks_what_it_lacks(model: Path, text: Path, copied: Path) -> None:
    expected = run(model, copied, text)
    missing = ("text_warning", "head_bits", "heldout_tokens", "tied", "layer_error", "notes")

    def older(saved: dict[str, Any]) -> None:
        for name in missing:
            saved.pop(name)
        for row in saved["results"]:
            row.pop("rtn"), row.pop("bytes")
        saved["results"].pop()

    edit_report(copied, older)
    report = run(model, copied, text)
    for row, wanted in zip(report.results, expected.results, strict=True):
        known = row["bits"] != 4  # it has no row for 4 bits
        assert (row["bits"], row["bytes"], row["bpw_read"]) == (wanted["bits"], wanted["bytes"], wanted["bpw_read"])
        assert [row[name] for name in MEASURES] == [
            wanted[name] if known and name != "rtn" else None for name in MEASURES
        ]
    assert report.reference == expected.reference
    assert report.tied == expected.tied
    assert dict(report.layer_error) == {}
    assert "not measured" in str(report)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "", '{"results": 3}', '{"results": [{"nll": 1.0}]}', '{"results": [{"bits": 2, "nll": "much"}]}',
     '{"layer_error": {"a": 1}}', '{"left_out": ["a"]}'],
)  # fmt: skip
def test_a_malformed_report_is_named_and_its_measures_left_out(
    content: str, model: Path, text: Path, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(model, copied, text)
    (copied / "bitstrata_report.json").write_text(content)
    report = run(model, copied, text)
    assert "bitstrata_report.json" in caplog.text
    assert any("bitstrata_report.json" in note and "measures are left out" in note for note in report.notes)
    for row, wanted in zip(report.results, expected.results, strict=True):
        assert (row["bits"], row["bytes"], row["bpw_read"]) == (wanted["bits"], wanted["bytes"], wanted["bpw_read"])
        assert [row[name] for name in MEASURES] == [None] * 4
    assert "not measured" in str(report)


def test_a_finished_output_has_nothing_to_do_after_an_upgrade(
    model: Path, text: Path, copied: Path, unbroken: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "__version__", "99.1")
        report = run(model, copied, text)
    assert "nothing to do" in caplog.text
    assert report.results[0]["kld"] is not None
    assert digests(copied) == unbroken


def test_a_job_killed_while_it_cleaned_up_is_finished(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobState, "finish", JobState.close)
        run(model, tmp_path / "out", text)
    assert (tmp_path / "out" / ".job").is_dir()
    run(model, tmp_path / "out", text)
    assert not (tmp_path / "out" / ".job").exists()


def test_a_second_process_is_kept_out(model: Path, text: Path, tmp_path: Path, unbroken: dict[str, str]) -> None:
    interrupted(model, text, tmp_path / "out")
    with FileLock(tmp_path / "out" / ".job" / "lock"), pytest.raises(JobError, match="another process") as caught:
        run(model, tmp_path / "out", text)
    assert caught.value.hint
    run(model, tmp_path / "out", text)
    assert digests(tmp_path / "out") == unbroken


def test_a_damaged_block_is_named(model: Path, text: Path, tmp_path: Path, unbroken: dict[str, str]) -> None:
    interrupted(model, text, tmp_path / "out", 1)
    block = tmp_path / "out" / ".job" / "block-0001.safetensors"
    block.write_bytes(block.read_bytes()[:-100])
    with pytest.raises(JobError, match=r"block-0001\.safetensors is damaged") as caught:
        run(model, tmp_path / "out", text)
    assert "delete that file" in (caught.value.hint or "")
    block.unlink()
    run(model, tmp_path / "out", text)
    assert digests(tmp_path / "out") == unbroken


@pytest.mark.parametrize("content", ["{", "[]", "", "\x00\x01"])
def test_an_unreadable_fingerprint_is_named(content: str, model: Path, text: Path, tmp_path: Path) -> None:
    interrupted(model, text, tmp_path / "out")
    (tmp_path / "out" / ".job" / "job.json").write_text(content)
    with pytest.raises(JobError) as caught:
        run(model, tmp_path / "out", text)
    assert "delete" in (caught.value.hint or "")


def test_a_folder_in_the_place_of_the_fingerprint_is_named(model: Path, text: Path, tmp_path: Path) -> None:
    interrupted(model, text, tmp_path / "out")
    (tmp_path / "out" / ".job" / "job.json").unlink()
    (tmp_path / "out" / ".job" / "job.json").mkdir()
    with pytest.raises(JobError, match=r"job\.json is not readable") as caught:
        run(model, tmp_path / "out", text)
    assert "delete" in (caught.value.hint or "")


def test_an_unfinished_job_is_continued_by_the_same_versions_only(
    model: Path, text: Path, tmp_path: Path, unbroken: dict[str, str]
) -> None:
    interrupted(model, text, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "__version__", "99.1")
        with pytest.raises(JobError, match=r"other versions: versions\.bitstrata was .*, is now 99\.1") as caught:
            run(model, tmp_path / "out", text)
    assert "install these versions again" in (caught.value.hint or "")
    run(model, tmp_path / "out", text)
    assert digests(tmp_path / "out") == unbroken


def test_the_random_state_of_the_caller_does_not_matter(
    model: Path, text: Path, tmp_path: Path, unbroken: dict[str, str]
) -> None:
    torch.manual_seed(12345)
    torch.rand(3)
    run(model, tmp_path / "out", text)
    assert digests(tmp_path / "out") == unbroken


def other_words(content: dict[str, Any]) -> None:
    words = content["model"]["vocab"]
    words["e"], words["t"] = words["t"], words["e"]


def no_prefix(content: dict[str, Any]) -> None:
    """BOS is still defined, and no longer added: windows start differently."""
    content["post_processor"] = None


@pytest.mark.parametrize("change", [other_words, no_prefix])
def test_another_tokenizer_is_refused_on_resume(
    change: Callable[[dict[str, Any]], None], model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = shutil.copytree(model, tmp_path / "source"), tmp_path / "out"
    with monkeypatch.context() as patch:
        break_after(0, patch)
        with pytest.raises(InterruptedJobError):
            run(source, output, text)
    path = source / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(JobError, match="windows_sha256"):
        run(source, output, text)


def test_a_foreign_folder_with_a_job_folder_is_left_alone(model: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / ".job").mkdir(parents=True)
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(PreflightError, match="left alone"):
        run(model, output, text)
    assert sorted(path.name for path in output.rglob("*")) == [".job", "thesis.txt"]
