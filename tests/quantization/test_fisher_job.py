"""Jobs that need the whole model's gradients: computed once, made durable, resumed to the same bytes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from job_helpers import ANYPRECISION, digests, run
from job_process import finish
from safetensors.torch import load_file
from tiny_models import tiny_gpt2
from torch import Tensor

from bitstrata.calibration import BlockRunner, calibration_windows, fisher_diagonal, read_text
from bitstrata.checkpoint import CheckpointReader, is_checkpoint
from bitstrata.errors import JobError, PreflightError
from bitstrata.models import SourceModel, discover, load_tokenizer
from bitstrata.planes import decode
from bitstrata.quantization import gradients
from bitstrata.quantization.preflight import heldout_windows
from bitstrata.quantization.state import JobState
from bitstrata.solvers import AnyPrecision

Count = Callable[[], int]


class InterruptedJobError(Exception):
    """Stands for whatever ends a process early."""


@pytest.fixture(scope="module")
def unbroken(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the files that the job writes when nothing interrupts it."""
    output = tmp_path_factory.mktemp("unbroken") / "out"
    run(model, output, text, **ANYPRECISION)
    return digests(output)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Count:
    """How often gradients were computed so far."""
    calls: list[Any] = []

    def counting(*arguments: Any) -> Any:
        calls.append(arguments)
        return fisher_diagonal(*arguments)

    monkeypatch.setattr(gradients, "fisher_diagonal", counting)
    return lambda: len(calls)


def interrupted(model: Path, text: Path, output: Path, files: int) -> None:
    """Leave a job in `output` that has made its sensitivities (0 files) or so many blocks durable."""
    with pytest.MonkeyPatch.context() as patch:
        save = JobState.save

        def save_and_stop(self: JobState, block: Any, weights: Any) -> None:
            if files == 0:
                raise InterruptedJobError
            save(self, block, weights)
            if block == files - 1:
                raise InterruptedJobError

        patch.setattr(JobState, "save", save_and_stop)
        with pytest.raises(InterruptedJobError):
            run(model, output, text, **ANYPRECISION)


@pytest.mark.parametrize("files", [0, 1, 2, 3])
def test_an_interrupted_job_does_not_compute_gradients_again(
    files: int, model: Path, text: Path, tmp_path: Path, unbroken: dict[str, str], computed: Count
) -> None:
    output = tmp_path / "out"
    interrupted(model, text, output, files)
    assert computed() == 1
    assert len(list((output / ".job").glob("block-*"))) == files
    left = [path.stem for path in sorted((output / ".job").glob("fisher-*"))]
    assert left == [f"fisher-{index:04d}" for index in range(max(0, files - 1), 3)]  # dropped once a block is durable
    run(model, output, text, **ANYPRECISION)
    assert computed() == 1
    assert digests(output) == unbroken


# before and after each file: the fingerprint, three blocks' sensitivities, three blocks
SOME = (2, 5, 7, 13)
MOMENTS = [
    pytest.param(SOME, id="some"),
    pytest.param(sorted(set(range(2 * 7)) - set(SOME)), id="the-others", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("moments", MOMENTS)
def test_killed_before_and_after_files_of_the_job(
    moments: list[int], model: Path, text: Path, tmp_path: Path, unbroken: dict[str, str]
) -> None:
    log = tmp_path / "log"
    for moment in moments:
        output = tmp_path / f"out-{moment}"
        command = [
            "quantize", str(model), "-o", str(output), "--calibration", str(text), "--method", "anyprecision",
            "--group-size", "32", "--num-samples", "6", "--seq-len", "32", "--device", "cpu",
        ]  # fmt: skip
        assert finish(command, log, kill_at=moment) == -signal.SIGKILL, log.read_text()
        assert not is_checkpoint(output)
        assert finish(command, log) == 0, log.read_text()
        assert digests(output) == unbroken, f"killed at moment {moment}"


def test_damaged_sensitivities_are_named_and_can_be_made_again(
    model: Path, text: Path, tmp_path: Path, unbroken: dict[str, str]
) -> None:
    output = tmp_path / "out"
    interrupted(model, text, output, 1)
    file = output / ".job" / "fisher-0001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(JobError, match=r"fisher-0001\.safetensors is damaged") as caught:
        run(model, output, text, **ANYPRECISION)
    assert "delete that file" in (caught.value.hint or "")
    file.unlink()
    run(model, output, text, **ANYPRECISION)
    assert digests(output) == unbroken


@pytest.mark.parametrize("transposed", [False, True])
def test_layers_are_solved_with_the_gradients_on_the_calibration_windows(
    transposed: bool, model: Path, text: Path, tmp_path: Path
) -> None:
    folder = tiny_gpt2(tmp_path / "gpt2") if transposed else model
    run(folder, tmp_path / "out", text, **ANYPRECISION)
    windows = calibration_windows(
        load_tokenizer(folder), read_text(text), num_samples=6, seq_len=32, num_heldout=heldout_windows(32), seed=0
    )
    source = SourceModel(folder)
    skeleton = source.skeleton()
    discovery = discover(skeleton)
    runner = BlockRunner(source, skeleton, discovery, 32, torch.device("cpu"))
    fisher: dict[str, Tensor] = {}
    fisher_diagonal(runner, windows.calibration, lambda index, found: fisher.update(found))
    stored = load_file(folder / "model.safetensors")
    reader = CheckpointReader(tmp_path / "out")
    for linear in discovery.linears:
        weight = stored[f"{linear.name}.weight"]
        weight = weight.T.contiguous() if linear.transposed else weight
        expected = AnyPrecision().solve_layer(weight, (2, 3, 4), 32, fisher[linear.name])
        assert reader.spec.layers[linear.name].decoder == "codebook"
        for bits in (2, 3, 4):
            assert torch.equal(decode(reader.layer(linear.name), bits), decode(expected, bits)), linear.name


def test_fast_needs_neither_text_nor_gradients(model: Path, tmp_path: Path, computed: Count) -> None:
    run(model, tmp_path / "out", None, method="anyprecision", options={}, preset="fast")
    assert is_checkpoint(tmp_path / "out")
    assert computed() == 0


def test_the_default_needs_text(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="anyprecision needs calibration text") as caught:
        run(model, tmp_path / "out", None, **ANYPRECISION)
    assert "--preset fast" in str(caught.value.problems[0].hint)


def test_too_little_memory_for_the_whole_model_is_found_before_anything_is_written(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1_000_000}))
    with pytest.raises(PreflightError, match="of memory") as caught:
        run(model, tmp_path / "out", text, **ANYPRECISION)
    assert "--preset fast" in str(caught.value.problems[0].hint)
    assert list(tmp_path.iterdir()) == []
