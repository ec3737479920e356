"""Preflight refuses what would run out of memory or disk, and what it says is needed is what is taken."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from control_groups import cgroups, group  # noqa: F401  (a fixture)
from job_helpers import ANYBCQ, ANYPRECISION, RTN, run
from tiny_models import tiny_gpt2, tiny_llama

import bitstrata
from bitstrata import memory
from bitstrata.calibration.block_runner import TOKENS_PER_BATCH
from bitstrata.checkpoint import writer
from bitstrata.errors import PreflightError, ResourceError
from bitstrata.models import SourceModel
from bitstrata.quantization import job, preflight, tuning
from bitstrata.quantization.context import Prepared

MB = 10**6
TUNED = {"method": "nested", "preset": "best", "options": {"iterations": 1, "tune_steps": 3}}


def needed(model: Path, output: Path, text: Path | None, **settings: Any) -> Prepared:
    """What preflight found out."""
    found: list[Prepared] = []
    check = preflight._check_resources

    def noted(prepared: Prepared) -> Any:
        found.append(prepared)
        return check(prepared)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "_check_resources", noted)
        run(model, output, text, dry_run=True, **settings)
    return found[0]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that needs about 75 MB: its vocabulary lies outside of the blocks."""
    return tiny_llama(tmp_path_factory.mktemp("wide"), vocab_size=146_000)


@pytest.mark.parametrize("version", ["_V1", "_V2"])
def test_a_containers_limit_is_what_is_free(
    version: str,
    wide: Path,
    tmp_path: Path,
    cgroups: Callable[..., Path],  # noqa: F811
) -> None:
    settings = {"method": "rtn", "bits": 2, "device": "cpu"}
    root = cgroups("0::/box") if version == "_V2" else cgroups("4:memory:/box")
    folder = root / "box" if version == "_V2" else root / "memory" / "box"
    group(folder, getattr(memory, version), limit=4096 * MB, used=4086 * MB)  # 10 MB free, on a machine with more
    with pytest.raises(PreflightError, match=r"needs about 7\d\.\d MB of memory, 10\.0 MB are free") as caught:
        bitstrata.quantize(wide, tmp_path / "out", **settings)
    assert caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []
    group(folder, getattr(memory, version), limit=4096 * MB, used=4086 * MB, cache=80 * MB)  # which can be given up
    bitstrata.quantize(wide, tmp_path / "out", **settings)


def test_the_memory_of_the_gpu_counts_too(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1 << 33))
    for settings in (RTN, ANYPRECISION):
        with pytest.raises(PreflightError, match=r"of GPU memory, 0\.0 MB are free") as caught:
            run(model, tmp_path / "out", text, **{**settings, "device": "cuda"})
        (problem,) = caught.value.problems
        assert isinstance(problem, ResourceError)
        assert "--device cpu" in (problem.hint or "")
    assert list(tmp_path.iterdir()) == []


def test_on_a_gpu_hidden_states_are_in_main_memory_and_the_work_is_not(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = needed(model, tmp_path / "out", text, **ANYBCQ).memory
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    monkeypatch.setattr(job, "told", lambda prepared: "")  # there is no GPU to time
    monkeypatch.setattr(preflight, "BlockRunner", lambda *_: type("Runner", (), {"check": lambda self, window: None})())
    there = needed(model, tmp_path / "out", text, **ANYBCQ, device="cuda").memory
    assert here.gpu == 0
    assert (
        here.main - there.gpu == 4 * TOKENS_PER_BATCH * 64 * 4
    )  # hidden states of what runs at a time, however long the text
    assert here.main - there.gpu < there.main < here.main + there.gpu
    tuned = needed(model, tmp_path / "out", text, **TUNED, device="cuda").memory
    assert tuned.main == there.main, "a block at a time"
    gradients = needed(model, tmp_path / "out", text, **ANYPRECISION, device="cuda").memory
    weights = sum(math.prod(SourceModel(model).spec(name)[1]) for name in SourceModel(model).files)
    assert gradients.main > 4 * weights, "the whole model passes through main memory"


JOBS: dict[str, dict[str, Any]] = {
    "rtn": {**RTN, "calibration": None},
    "one precision": {**RTN, "bits": 4},
    "with a head": {**RTN, "head_bits": 6},
    "eight bits": {**RTN, "bits": "1-8", "group_size": 8},
    "gradients": ANYPRECISION,
    "tuned": {**TUNED, "group_size": 8},
    "tuned with a head": {**TUNED, "head_bits": 4},
}


@pytest.mark.parametrize(
    ("job", "build"), [*((job, tiny_llama) for job in JOBS), ("rtn", tiny_gpt2), ("tuned with a head", tiny_gpt2)]
)
def test_the_disk_that_is_asked_for_is_what_the_job_takes_at_its_peak(
    job: str, build: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output, peak = build(tmp_path / "model"), tmp_path / "out", 0
    settings = {"calibration": text, **JOBS[job]}
    estimate = needed(source, output, settings.pop("calibration"), **settings).disk_bytes
    replace = os.replace

    def watched(one: Any, other: Any) -> None:
        nonlocal peak
        for step in (lambda: None, lambda: replace(one, other)):
            step()
            peak = max(peak, sum(path.stat().st_size for path in output.rglob("*") if path.is_file()))

    monkeypatch.setattr(writer.os, "replace", watched)
    monkeypatch.setattr(tuning, "SAVE_SECONDS", -1.0)  # so that a state is saved at all
    run(source, output, {"calibration": text, **JOBS[job]}["calibration"], **settings)
    assert not (output / ".job").exists()
    assert peak <= estimate < 1.6 * peak, f"{peak} bytes were taken, {estimate} asked for"


def test_a_disk_with_a_byte_less_is_refused(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = needed(model, tmp_path / "out", text, **TUNED).disk_bytes
    usage = type("Usage", (), {"free": size - 1})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(PreflightError, match="of disk") as caught:
        run(model, tmp_path / "out", text, **TUNED)
    assert caught.value.exit_code == 4
    usage.free = size  # type: ignore[attr-defined]
    run(model, tmp_path / "out", text, **TUNED)
