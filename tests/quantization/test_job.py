"""`bitstrata.quantize` from a model folder to a checkpoint, on a tiny model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from job_helpers import (
    ANYBCQ,
    ANYPRECISION,
    BCQ,
    RTN,
    assert_report_measures_the_checkpoint,
    digests,
    run,
)
from safetensors.torch import load_file, save_file
from tiny_models import tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM

import bitstrata
from bitstrata.checkpoint import CheckpointReader, validate
from bitstrata.demonstration.run import MODEL
from bitstrata.errors import PreflightError
from bitstrata.planes import decode

# of the tiny Llama's quantized layers: query and output, key and value, gate and up, down
BLOCK_ROWS = 2 * 64 + 2 * 32 + 2 * 96 + 64
BLOCK_WEIGHTS = 64 * (2 * 64 + 2 * 32 + 2 * 96) + 96 * 64
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("method", [RTN, BCQ, ANYBCQ, ANYPRECISION], ids=lambda method: method["method"])
def test_every_method_end_to_end(method: dict[str, Any], model: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    report = run(model, output, text, **method)
    assert validate(output) == []
    assert report.method == method["method"]
    assert [row["bits"] for row in report.results] == [2, 3, 4]
    for row in report.results:
        if method is ANYPRECISION:  # a table a row
            assert row["bpw_read"] == pytest.approx(row["bits"] + 16 * 2 ** row["bits"] * BLOCK_ROWS / BLOCK_WEIGHTS)
        else:
            assert row["bpw_read"] == row["bits"] + 16 / 32 * (row["bits"] + 1)
        assert row["rtn"]["kld"] > 0
        assert row["verdict"]
    klds = [row["kld"] for row in report.results]
    assert klds == sorted(klds, reverse=True), f"more bits are worse: {klds}"
    for layer, errors in report.layer_error.items():
        assert list(errors) == ["2", "3", "4"], layer
        assert errors["4"] < errors["2"] < 1, layer
        if method is BCQ:
            assert errors["4"] <= errors["3"] <= errors["2"], layer
    assert set(report.layer_error) == {
        f"model.layers.{block}.{part}.{name}"
        for block in range(3)
        for part, name in (("self_attn" if "o_proj" in n or n[0] in "qkv" else "mlp", n) for n in LAYERS)
    }
    assert not (output / ".job").exists()
    assert report.total_bytes == sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    assert report.peak_memory_bytes > 0
    assert "2" in str(report)


def test_the_report_file_holds_the_report_without_what_varies(model: Path, text: Path, tmp_path: Path) -> None:
    report = run(model, tmp_path / "out", text)
    saved = json.loads((tmp_path / "out" / "bitstrata_report.json").read_text())
    assert saved == json.loads(json.dumps(report.saved()))
    assert not saved.keys() & {"output", "seconds", "peak_memory_bytes", "total_bytes"}
    assert {entry["reason"] for entry in saved["left_out"]} == {"embedding", "output head"}


def test_the_same_command_gives_the_same_bytes(model: Path, text: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "one", text)
    run(model, tmp_path / "two", text)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_the_reported_measures_are_those_of_the_loaded_model(model: Path, text: Path, tmp_path: Path) -> None:
    """The job measures with chains of blocks; the checkpoint that it wrote must measure the same."""
    report = run(model, tmp_path / "out", text)
    assert_report_measures_the_checkpoint(report, model, tmp_path / "out", text)


def test_layer_errors_are_those_of_the_stored_planes(model: Path, text: Path, tmp_path: Path) -> None:
    report = run(model, tmp_path / "out", text, **BCQ)
    reader, original = CheckpointReader(tmp_path / "out"), load_file(model / "model.safetensors")
    for layer, errors in report.layer_error.items():
        w = original[f"{layer}.weight"].double()
        for bits, error in errors.items():
            dense = decode(reader.layer(layer), int(bits), torch.float64)
            assert error == pytest.approx(float((dense - w).square().sum() / w.square().sum()), rel=1e-4)


def test_one_set_of_bits_does_not_depend_on_the_others(model: Path, text: Path, tmp_path: Path) -> None:
    """Chains are carried per precision through the whole model, so planes and scales are the same files."""
    few, many = run(model, tmp_path / "few", text, bits="2,3"), run(model, tmp_path / "many", text, bits="2-4")
    shared = ["model-bits-2", "model-bits-3", "model-plane-0", "model-plane-1", "model-plane-2", "model-common"]
    one, other = digests(tmp_path / "few"), digests(tmp_path / "many")
    for name in shared:
        assert one[f"{name}.safetensors"] == other[f"{name}.safetensors"], name
    assert few.results[0] == many.results[0]
    assert few.results[1] == many.results[1]


def test_a_dry_run_writes_nothing_and_knows_the_sizes(
    model: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    planned = run(model, tmp_path / "out", text, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    said = caplog.text
    assert "model.layers.2.mlp.down_proj: [64, 96] -> bits (2, 3, 4)" in said
    assert "lm_head.weight: [64, 64] stays as it is (output head)" in said
    assert "nothing was written" in said
    assert {row["verdict"] for row in planned.results} == {"not measured"}
    done = run(model, tmp_path / "out", text)
    for expected, row in zip(planned.results, done.results, strict=True):
        assert (expected["bytes"], expected["bpw_read"]) == (row["bytes"], row["bpw_read"])
    assert run(model, tmp_path / "out", text, dry_run=True).results == planned.results


def test_without_text_nothing_is_measured_and_that_is_said(model: Path, tmp_path: Path) -> None:
    report = run(model, tmp_path / "out", None, **BCQ)
    assert report.reference is None
    assert report.heldout_tokens == 0
    for row in report.results:
        assert (row["nll"], row["kld"], row["rtn"]) == (None, None, None)
        assert row["verdict"].startswith("not measured")
    assert validate(tmp_path / "out") == []


def test_skipped_layers_stay_as_they_are(model: Path, text: Path, tmp_path: Path) -> None:
    skip = ("model.layers.0.*", r"re:.*\.down_proj")
    report = run(model, tmp_path / "out", text, skip=skip, **RTN)
    reasons = {entry["name"]: entry["reason"] for entry in report.left_out}
    assert reasons["model.layers.0.mlp.up_proj.weight"] == "skipped by --skip model.layers.0.*"
    assert reasons["model.layers.1.mlp.down_proj.weight"] == r"skipped by --skip re:.*\.down_proj"
    assert len(report.layer_error) == 2 * 6
    common = load_file(tmp_path / "out" / "model-common.safetensors")
    original = load_file(model / "model.safetensors")
    assert torch.equal(common["model.layers.0.mlp.up_proj.weight"], original["model.layers.0.mlp.up_proj.weight"])
    loaded = bitstrata.load(tmp_path / "out", device="cpu")
    assert isinstance(loaded.get_submodule("model.layers.0.mlp.up_proj"), torch.nn.Linear)


def test_transposed_linears_and_tied_heads(text: Path, tmp_path: Path) -> None:
    source = tiny_gpt2(tmp_path / "gpt2")
    report = run(source, tmp_path / "out", text, bits="2,6")
    assert report.tied == (("transformer.wte.weight", "lm_head.weight"),)
    assert report.results[1]["kld"] < 0.01 < report.results[0]["kld"]
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    loaded = bitstrata.load(tmp_path / "out", device="cpu")
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        difference = (loaded(ids, bits=6).logits - original(ids).logits).abs().max()
    assert float(difference) < 0.5
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_all_zero_and_constant_layers_come_out_finite(text: Path, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"].zero_()
    weights["model.layers.1.self_attn.v_proj.weight"].fill_(0.01)
    weights["model.layers.1.mlp.up_proj.weight"][::2] = 0
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    for method in (RTN, BCQ, ANYBCQ, ANYPRECISION):
        output = tmp_path / str(method["method"])
        report = run(source, output, text, **method)
        assert report.layer_error["model.layers.0.mlp.down_proj"] == {"2": 0.0, "3": 0.0, "4": 0.0}
        assert report.layer_error["model.layers.1.self_attn.v_proj"]["4"] < 1e-3
        assert all(row["kld"] < 5 for row in report.results)
        reader = CheckpointReader(output)
        assert not bool(decode(reader.layer("model.layers.0.mlp.down_proj"), 3).any())


def test_a_model_in_bfloat16_stays_in_bfloat16(text: Path, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    run(source, tmp_path / "out", text, **RTN)
    common = load_file(tmp_path / "out" / "model-common.safetensors")
    assert {tensor.dtype for tensor in common.values()} == {torch.bfloat16}
    assert bitstrata.load(tmp_path / "out", device="cpu").dtype == torch.bfloat16


def test_groups_wider_than_every_layer_are_lowered_with_a_note(model: Path, tmp_path: Path) -> None:
    report = run(model, tmp_path / "out", None, group_size=10**9, **RTN)
    assert report.group_size == 96
    assert any("group-size lowered from 1000000000 to 96" in note for note in report.notes)
    assert CheckpointReader(tmp_path / "out").spec.group_size == 96


def test_windows_longer_than_the_context_are_lowered_with_a_note(model: Path, text: Path, tmp_path: Path) -> None:
    report = run(model, tmp_path / "out", text, seq_len=4096, **RTN)
    assert any("seq-len lowered from 4096 to 64" in note for note in report.notes)


def test_text_of_another_kind_is_said_in_the_report(tmp_path: Path) -> None:
    """The demo's model has learnt Python; prose in another language it cannot predict."""
    foreign = tmp_path / "foreign.txt"
    words = ["la", "noche", "pasa", "lentamente", "sobre", "el", "campo", "y", "nadie", "recuerda", "aquella", "lluvia"]
    draw = random.Random(0)
    foreign.write_text(" ".join(draw.choice(words) for _ in range(4000)))
    for text, warned in ((foreign, True), ("stdlib", False)):
        report = bitstrata.quantize(
            MODEL, tmp_path / f"out-{warned}", bits="4", method="rtn", calibration=text, num_samples=4, seq_len=64
        )
        assert (report.text_warning is not None) == warned
        assert ("it is not the kind of text this model was made for" in str(report)) == warned


@pytest.mark.parametrize("name", ["bpdq", "gptq"])
def test_methods_of_one_precision_refuse_several(name, model, text, tmp_path):
    with pytest.raises(PreflightError, match="makes one precision a file"):
        run(model, tmp_path / "out", text, method=name, options={})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["nested", "bpdq", "gptq"])
def test_calibration_is_asked_for(name, model, tmp_path):
    with pytest.raises(PreflightError, match=f"{name} needs calibration text"):
        run(model, tmp_path / "out", None, method=name, options={}, bits="3")


@pytest.mark.slow
def test_nested_on_a_trained_model(tmp_path):
    """One nested file is nearer to the original than a dedicated GPTQ file."""
    settings = {"group_size": 128, "num_samples": 16, "seq_len": 128}
    quick = {"iterations": 2, "sweeps": 1}
    nested = run(MODEL, tmp_path / "nested", "stdlib", method="nested", options=quick, **settings)
    kld = {row["bits"]: row["kld"] for row in nested.results}
    assert kld[4] < kld[3] < kld[2]
    dedicated = run(MODEL, tmp_path / "gptq", "stdlib", method="gptq", options={}, bits=3, **settings)
    assert kld[3] < dedicated.results[0]["kld"]
