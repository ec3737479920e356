"""`--head-bits`: the output head and the embedding as planes, from the solver to the finished checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from job_helpers import ANYBCQ, BCQ, RTN, assert_report_measures_the_checkpoint, digests, run
from safetensors.torch import load_file, save_file
from tiny_models import tiny_gpt2, tiny_llama

import bitstrata
from bitstrata.checkpoint import CheckpointReader, validate
from bitstrata.errors import JobError, PreflightError
from bitstrata.planes import decode
from bitstrata.quantization import stages
from bitstrata.quantization.state import JobState
from bitstrata.solvers import make_method
from bitstrata.solvers.clipped import clipped_rows

TUNED = {"method": "nested", "preset": "best", "options": {"iterations": 1, "tune_steps": 3}}
NAMES = {"tied": ["model.embed_tokens"], "untied": ["model.embed_tokens", "lm_head"]}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {kind: tiny_llama(folder / kind, tie_word_embeddings=kind == "tied") for kind in NAMES}


def error(weight: torch.Tensor, planes: Any, bits: int) -> torch.Tensor:
    return (decode(planes, bits, torch.float64) - weight).square()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("columns", "group_size"), [(64, 32), (70, 32), (33, 128), (5, 1)])
def test_no_group_is_worse_than_round_to_nearest(bits: int, columns: int, group_size: int, seed: int) -> None:
    w = torch.randn(17, columns, generator=torch.Generator().manual_seed(seed))
    mine = error(w, clipped_rows(w, bits, group_size), bits)
    plain = error(w, make_method("rtn", "default", {}).solve_rows(w, (bits,), group_size), bits)
    for start in range(0, columns, group_size):
        group = slice(start, start + group_size)
        assert bool((mine[:, group].sum(1) <= plain[:, group].sum(1) * (1 + 1e-5) + 1e-12).all())
    if bits >= 2 and group_size >= 32:
        assert float(mine.sum()) < 0.97 * float(plain.sum())


def test_constant_zero_and_tiny_rows_come_out_finite() -> None:
    w = torch.zeros(4, 64)
    w[1], w[2] = 0.25, torch.randn(64) * 1e-6
    w[3, 0] = 3e4
    for bits in (1, 4, 8):
        dense = decode(clipped_rows(w, bits, 32), bits)
        assert bool(dense.isfinite().all())
        assert torch.equal(dense[:2], w[:2])
        assert float((dense[2] - w[2]).abs().max()) < 5e-6


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("method", [RTN, ANYBCQ, TUNED], ids=lambda method: method["method"])
def test_the_reported_measures_are_those_of_the_loaded_model(
    kind: str, method: dict[str, Any], sources: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    """Chains start from the quantized embedding and end in the quantized head."""
    report = run(sources[kind], tmp_path / "out", text, head_bits=4, **method)
    assert validate(tmp_path / "out") == []
    assert_report_measures_the_checkpoint(report, sources[kind], tmp_path / "out", text)


@pytest.mark.parametrize("kind", NAMES)
def test_sizes_errors_and_left_out_know_the_head(
    kind: str, sources: dict[str, Path], text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    planned = run(sources[kind], tmp_path / "out", text, head_bits=6, dry_run=True, **BCQ)
    said = caplog.text
    tie = ", shared with lm_head" if kind == "tied" else ""
    assert f"model.embed_tokens: [64, 64] -> 6 bits (embedding{tie})" in said
    assert ("lm_head: [64, 64] -> 6 bits (head)" in said) == (kind == "untied")
    assert "stays as it is" not in said
    assert list(tmp_path.iterdir()) == []
    report = run(sources[kind], tmp_path / "out", text, head_bits=6, **BCQ)
    without = run(sources[kind], tmp_path / "without", text, **BCQ)
    one = 64 * 64 * 6 // 8 + 7 * 64 * 2 * 2
    for expected, row, plain in zip(planned.results, report.results, without.results, strict=True):
        assert expected["bytes"] == row["bytes"] == plain["bytes"] + one
    assert report.left_out == ()
    assert report.head_bits == 6
    assert "head and embedding at 6 bits" in str(report)
    assert report.total_bytes < without.total_bytes
    reader, weights = CheckpointReader(tmp_path / "out"), load_file(sources[kind] / "model.safetensors")
    assert list(reader.spec.layers)[14:] == NAMES[kind]
    assert reader.spec.format_version == 2
    for name in NAMES[kind]:
        assert reader.weight_map[f"{name}.plane_5"] == "model-head.safetensors"
        w = weights[f"{name}.weight"].double()
        wrong = error(w, reader.layer(name), 6).sum() / w.square().sum()
        assert report.layer_error[name] == {"6": pytest.approx(float(wrong), rel=1e-5)}
        assert wrong < 1e-3
    assert (tmp_path / "without" / "config.json").read_text().count('"format_version": 1') == 1
    inspected = bitstrata.inspect(tmp_path / "out", verify=True)
    assert inspected.bytes["2"] == report.results[0]["bytes"]
    kept = bitstrata.inspect(tmp_path / "without").common_bytes
    assert inspected.common_bytes < kept - len(NAMES[kind]) * 64 * 64 * 4 + 2048  # headers name more tensors
    measured = bitstrata.evaluate(tmp_path / "out", text, max_tokens=40, device="cpu")
    for result, row in zip(measured.results, report.results, strict=True):
        assert (result.bytes, result.bpw_read) == (row["bytes"], row["bpw_read"])


def test_how_rows_are_cut_leaves_no_trace(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(sources["tied"], tmp_path / "whole", None, head_bits=5, **RTN)
    monkeypatch.setattr(stages, "CHUNK", 64 * 7)
    run(sources["tied"], tmp_path / "cut", None, head_bits=5, **RTN)
    assert digests(tmp_path / "whole") == digests(tmp_path / "cut")


@pytest.mark.parametrize("part", ["embedding", "head", 0, 1])
def test_an_interrupted_job_ends_with_the_same_bytes(
    part: Any, sources: dict[str, Path], text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"head_bits": 6, **BCQ}
    run(sources["untied"], tmp_path / "unbroken", text, **settings)
    save, solved = JobState.save, []

    def save_and_stop(self: JobState, index: Any, weights: Any) -> None:
        save(self, index, weights)
        if index == part:
            raise KeyboardInterrupt

    def save_and_note(self: JobState, index: Any, weights: Any) -> None:
        solved.append(index)
        save(self, index, weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobState, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(sources["untied"], tmp_path / "out", text, **settings)
    caplog.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobState, "save", save_and_note)
        run(sources["untied"], tmp_path / "out", text, **settings)
    order = ["embedding", "head", 0, 1]
    assert solved == order[order.index(part) + 1 :]
    assert "resuming: model.embed_tokens is already done" in caplog.text
    assert digests(tmp_path / "out") == digests(tmp_path / "unbroken")


def test_another_precision_does_not_continue_the_job(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.Head, "_error", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(sources["tied"], tmp_path / "out", None, head_bits=6, **RTN)
    for other in (5, None):
        with pytest.raises(JobError, match=f"head_bits was 6, is now {other}"):
            run(sources["tied"], tmp_path / "out", None, head_bits=other, **RTN)
    run(sources["tied"], tmp_path / "out", None, head_bits=6, **RTN)
    with pytest.raises(PreflightError, match="head_bits was 6, is now None"):
        run(sources["tied"], tmp_path / "out", None, **RTN)


def test_a_damaged_part_is_named(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.Head, "_error", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(sources["tied"], tmp_path / "out", None, head_bits=6, **RTN)
    (tmp_path / "out" / ".job" / "embedding.safetensors").write_bytes(b"not a file")
    with pytest.raises(JobError, match=r"embedding\.safetensors is damaged"):
        run(sources["tied"], tmp_path / "out", None, head_bits=6, **RTN)


@pytest.mark.parametrize("value", [0, 9, -1, True, "6", 4.0])
def test_a_wrong_precision_is_one_of_the_problems_found_first(value: Any, model: Path, tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="--head-bits must be a whole number from 1 to 8") as caught:
        run(model, tmp_path / "out", None, head_bits=value, **RTN)
    assert "4 to 8 are usual" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_head_beyond_the_range_of_scales_is_refused_with_the_right_hint(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"].fill_(1e6)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(PreflightError, match=r"lm_head\.weight has weights above 65504") as caught:
        run(source, tmp_path / "out", None, head_bits=6, **RTN)
    assert "leave --head-bits out" in str(caught.value)


def test_transposed_models_with_a_tied_head(text: Path, tmp_path: Path) -> None:
    source = tiny_gpt2(tmp_path / "gpt2")
    report = run(source, tmp_path / "out", text, bits="2,6", head_bits=8, **BCQ)
    assert report.tied == (("transformer.wte.weight", "lm_head.weight"),)
    assert [entry["name"] for entry in report.left_out] == ["transformer.wpe.weight"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["layers"]["transformer.wte"]["tied"] == "lm_head"
    assert report.results[1]["kld"] < 0.01 < report.results[0]["kld"]
