"""Export as plain safetensors: transformers alone loads it, and computes what the planes stand for."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitstrata
from bitstrata.checkpoint import CheckpointReader
from bitstrata.errors import CheckError, ResourceError, UnsupportedBitsError, UsageError
from bitstrata.exchange import dense, folder
from bitstrata.planes import decode

ARCHITECTURES = ["llama", "llama-tied", "gemma3", "phi3", "gpt2", "mixtral", "qwen3-moe"]


def logits(model, **more):
    ids = torch.arange(1, 25).view(1, -1)
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_alone_computes_the_same(name, quantized, tmp_path):
    _, _, out = quantized(name)
    result = bitstrata.export_model(out, tmp_path / "dense", format="dense", bits=3, dtype="float32")
    assert result.exact
    assert result.relative_error == 0
    assert not (tmp_path / "dense" / "bitstrata_report.json").exists()
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(plain).__module__.startswith("transformers.")
    found = logits(plain)
    ours = bitstrata.load(out, bits=3)
    with bitstrata.use_bits(ours, 3):
        expected = logits(ours)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
    assert not torch.allclose(found, logits(ours, bits=2), atol=2e-2 * float(expected.abs().max()))


def test_weights_are_the_decoded_ones_and_rounding_is_said(quantized, tmp_path):
    _, _, out = quantized("llama")
    reader = CheckpointReader(out)
    exact = bitstrata.export_model(f"{out}:2", tmp_path / "exact", format="dense", dtype="float32")
    rounded = bitstrata.export_model(out, tmp_path / "half", format="dense", bits="2", dtype="bfloat16")
    assert exact.bits == rounded.bits == 2
    assert 1e-4 < rounded.relative_error < 2.0**-8
    stored = [dict(AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()) for name in ("exact", "half")]
    for layer in reader.spec.linears:
        weight = decode(reader.layer(layer), 2)
        assert torch.equal(stored[0][f"{layer}.weight"], weight)
        assert torch.equal(stored[1][f"{layer}.weight"], weight.bfloat16())
    assert "exactly" in str(exact)
    assert json.loads(json.dumps(rounded.to_json()))["layers"][0]["type"] == "bfloat16"


def test_a_plan_gives_each_layer_its_bits(quantized, tmp_path):
    _, _, out = quantized("llama")
    reader = CheckpointReader(out)
    plan = {name: (2, 3, 8)[index % 3] for index, name in enumerate(reader.spec.planned_layers)}
    result = bitstrata.export_model(out, tmp_path / "dense", format="dense", bits=plan, dtype="float32")
    assert {one.name: one.bits for one in result.layers} == plan
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict()
    for layer, bits in plan.items():
        assert torch.equal(state[f"{layer}.weight"], decode(reader.layer(layer), bits)), layer


def test_shards_have_an_index(quantized, tmp_path, monkeypatch):
    _, _, out = quantized("llama")
    monkeypatch.setattr(dense, "SHARD_BYTES", 40_000)
    bitstrata.export_model(out, tmp_path / "dense", format="dense", dtype="float32")
    index = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert all((tmp_path / "dense" / file).stat().st_size < 45_000 for file in files)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"]


def test_refusals_leave_nothing_behind(quantized, tmp_path, monkeypatch):
    _, _, out = quantized("llama")
    target = tmp_path / "dense"
    with pytest.raises(UnsupportedBitsError):
        bitstrata.export_model(out, target, format="dense", bits=5)
    with pytest.raises(UsageError, match="format 'onnxx'"):
        bitstrata.export_model(out, target, format="onnxx")
    with pytest.raises(UsageError, match="dtype 'int8'"):
        bitstrata.export_model(out, target, format="dense", dtype="int8")
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: folder.shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ResourceError, match="MB of disk"):
        bitstrata.export_model(out, target, format="dense")
    monkeypatch.undo()

    def broken(folder):
        raise CheckError("no")

    monkeypatch.setattr(dense, "_check", broken)
    with pytest.raises(CheckError):
        bitstrata.export_model(out, target, format="dense")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    target.mkdir()
    (target / "mine").write_text("x")
    with pytest.raises(UsageError, match="is there already"):
        bitstrata.export_model(out, target, format="dense")
    assert [path.name for path in target.iterdir()] == ["mine"]


def test_a_command_writes_it_and_measures_on_a_text(tmp_path, capfd):
    from tiny_models import tiny_llama, tiny_text

    from bitstrata.cli.main import run

    source, text = tiny_llama(tmp_path / "source"), tiny_text(tmp_path / "text.txt")
    bitstrata.quantize(source, tmp_path / "out", bits="2,4", method="rtn", group_size=32)
    capfd.readouterr()
    arguments = ["export", tmp_path / "out", "--format", "dense", "--bits", 2, "-o", tmp_path / "dense"]
    assert run([str(one) for one in [*arguments, "--dtype", "bfloat16", "--text", text, "--json"]]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["format"] == "dense"
    assert shown["tokens"] > 100
    assert 0 < shown["kld"] < 1e-2
    assert shown["exact"] is False
    assert (tmp_path / "dense" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
