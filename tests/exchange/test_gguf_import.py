"""GGUF files into planes: number for number, and the model that they are of."""

from __future__ import annotations

import json

import pytest
import torch
from known_models import KNOWN, TEMPLATE, TEXT

import bitstrata
from bitstrata.checkpoint import CheckpointReader, validate
from bitstrata.cli.main import run
from bitstrata.errors import ModelError, UsageError
from bitstrata.exchange import gguf_model
from bitstrata.exchange.ggml import BLOCK_TYPES
from bitstrata.exchange.ggml_codes import GRIDS, grid_of_blocks
from bitstrata.exchange.uniform import planes_of
from bitstrata.models import load_tokenizer
from bitstrata.planes import decode
from bitstrata.plans import Plan

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed (extra gguf)")
HELD = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def dequantized(kind, data):
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))


def random_blocks(kind, rows=7, blocks=3):
    """Blocks of a type of any bytes, whose fp16 numbers are of an ordinary size."""
    generator = torch.Generator().manual_seed(len(kind))
    size = BLOCK_TYPES[kind].size
    data = torch.randint(0, 256, (rows * blocks, size), generator=generator, dtype=torch.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
    for at in places.get(kind, (0, 2) if kind.endswith("_1") else (0,)):
        numbers = (torch.rand(len(data), 1, generator=generator) + 0.01).half()
        data[:, at : at + 2] = numbers.view(torch.uint8)
    return data.view(rows, -1)


@pytest.mark.parametrize("kind", GRIDS)
def test_any_bytes_are_read_as_the_package_reads_them(kind):
    data = random_blocks(kind)
    grid = grid_of_blocks(kind, data, BLOCK_TYPES[kind].size)
    expected = dequantized(kind, data)
    torch.testing.assert_close(grid.values().float(), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", HELD)
def test_planes_are_the_same_numbers(kind):
    data = random_blocks(kind)
    grid = grid_of_blocks(kind, data, BLOCK_TYPES[kind].size)
    weight = planes_of(grid)
    assert weight is not None
    assert max(weight.bits) == grid.bits + (1 if kind.endswith("_1") else 0)
    assert torch.equal(decode(weight, max(weight.bits), torch.float64), grid.values())
    assert torch.equal(decode(weight, max(weight.bits)), dequantized(kind, data))
    rounded = planes_of(grid, rounded=True)
    assert rounded is not None
    assert rounded.bits == (grid.bits,)
    error = (decode(rounded, grid.bits, torch.float64) - grid.values()).norm() / grid.values().norm()
    assert error < 2.0**-10


def test_a_step_without_a_half_in_fp16_is_not_held():
    data = random_blocks("Q8_0", 1, 1)
    data[0, :2] = torch.tensor([1025 * 2.0**-24]).half().view(torch.uint8)  # odd, so its half falls between numbers
    grid = grid_of_blocks("Q8_0", data, 34)
    assert planes_of(grid) is None
    assert planes_of(grid, rounded=True) is not None


def logits(model, **more):
    ids = torch.arange(3, 60).view(1, -1)
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


@pytest.mark.parametrize("name", KNOWN)
def test_a_model_there_and_back(name, known, tmp_path):
    """Written as Q5_1 and imported: config, tokenizer, weights, and therefore logits, are the model's."""
    source, out = known(name)
    path = tmp_path / "m.gguf"
    types = ["Q5_1", "model.embed_tokens=Q8_0"]
    written = bitstrata.export_model(out, path, format="gguf", bits=4, types=types, refit=True)
    result = bitstrata.import_model(path, tmp_path / "back")
    assert result.exact
    assert validate(tmp_path / "back") == []
    assert {one.name for one in written.layers} < set(result.bits_of_layers)
    blocks = {one.name: one for one in gguf.GGUFReader(path).tensors}
    reader = CheckpointReader(tmp_path / "back")
    stored = blocks["blk.1.attn_output.weight"]
    weight = reader.layer("model.layers.1.self_attn.o_proj")
    expected = dequantized("Q5_1", torch.from_numpy(stored.data.copy()))
    assert torch.equal(decode(weight, max(weight.bits)), expected)
    before, after = load_tokenizer(source), load_tokenizer(tmp_path / "back")
    assert after(TEXT).input_ids == before(TEXT).input_ids
    assert after.decode(after(TEXT).input_ids) == before.decode(before(TEXT).input_ids)
    assert after.chat_template == TEMPLATE
    assert (after.bos_token, after.eos_token) == (before.bos_token, before.eos_token)
    model, ours = bitstrata.load(tmp_path / "back"), bitstrata.load(out, bits=4)
    expected = logits(ours)
    near, far = ((found - expected).norm() / expected.norm() for found in (logits(model), logits(ours, bits=2)))
    assert near < 0.05 < 0.2 < far


def test_layers_of_several_types_share_the_lowest_bits(known, tmp_path):
    _, out = known("llama-wide")
    types = ["Q4_0", "*.down_proj=Q8_0", "lm_head=Q8_0"]
    bitstrata.export_model(out, tmp_path / "m.gguf", format="gguf", bits=4, types=types, refit=True)
    result = bitstrata.import_model(tmp_path / "m.gguf", tmp_path / "back")
    assert result.exact
    assert result.bits == (4,)
    assert result.bits_of_layers["model.layers.0.mlp.down_proj"] == 8
    assert result.bits_of_layers["model.layers.0.mlp.up_proj"] == 4
    model, plan = bitstrata.load(tmp_path / "back"), Plan.load(tmp_path / "back" / "exact.json")
    assert plan["model.layers.0.mlp.down_proj"] == 8
    assert "exact.json" in result.notes[0]
    assert not torch.equal(logits(model, bits=plan), logits(model, bits=4))
    assert CheckpointReader(tmp_path / "back").spec.layers["lm_head"].role == "head"


def test_a_layer_without_a_rest_runs_beside_those_with_one(known, tmp_path):
    """Layers of Q4_1 have 5 bits with what fp16 offsets leave; one of Q4_0 is at 5 what it is at 4."""
    _, out = known("llama-wide")
    types = ["Q4_1", "*.down_proj=Q4_0"]
    bitstrata.export_model(out, tmp_path / "m.gguf", format="gguf", bits=4, types=types, refit=True)
    result = bitstrata.import_model(tmp_path / "m.gguf", tmp_path / "back")
    assert result.bits == (4, 5)
    assert set(result.bits_of_layers.values()) == {5}
    assert validate(tmp_path / "back") == []
    weight = CheckpointReader(tmp_path / "back").layer("model.layers.0.mlp.down_proj")
    assert torch.equal(decode(weight, 4), decode(weight, 5))
    assert not (tmp_path / "back" / "exact.json").exists()


def test_k_types_need_refit_which_says_the_loss(known, tmp_path):
    _, out = known("llama-wide")
    bitstrata.export_model(out, tmp_path / "m.gguf", format="gguf", bits=4, types="Q4_K", refit=True)
    with pytest.raises(UsageError, match="more digits than the fp16 numbers of planes") as refused:
        bitstrata.import_model(tmp_path / "m.gguf", tmp_path / "back")
    assert "--refit" in refused.value.hint
    assert not (tmp_path / "back").exists()
    result = bitstrata.import_model(tmp_path / "m.gguf", tmp_path / "back", refit=True)
    assert 0 < result.relative_error < 1e-3
    assert f"{result.relative_error:.2e}" in str(result)


def test_refusals_name_it_and_leave_nothing(known, tmp_path, capfd):
    _, out = known("llama")
    good, bad = tmp_path / "m.gguf", tmp_path / "bad.gguf"
    bitstrata.export_model(out, good, format="gguf", bits=4, types="IQ4_NL", refit=True)
    with pytest.raises(ModelError, match="as IQ4_NL, whose levels planes do not hold"):
        bitstrata.import_model(good, tmp_path / "back")
    for content in (b"", b"GGUF", good.read_bytes()[:3000], b"\0" * 100):
        bad.write_bytes(content)
        with pytest.raises(ModelError, match="not a whole GGUF file"):
            bitstrata.import_model(bad, tmp_path / "back")
    with pytest.raises(ModelError, match="is neither a"):
        bitstrata.import_model(tmp_path / "nothing", tmp_path / "back")
    (tmp_path / "x.gguf").mkdir()
    capfd.readouterr()
    assert run(["import", str(bad), "-o", str(tmp_path / "back")]) == 3
    assert "hint:" in capfd.readouterr().err
    assert not (tmp_path / "back").exists()
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]


def test_positions_of_an_unknown_kind_are_refused(known, tmp_path, monkeypatch):
    _, out = known("llama3")
    path = tmp_path / "m.gguf"
    monkeypatch.setattr(gguf_model, "rope_factors", lambda config: torch.linspace(1, 5, 8))
    bitstrata.export_model(out, path, format="gguf", bits=4, types="Q8_0", refit=True)
    with pytest.raises(ModelError, match="stretches positions"):
        bitstrata.import_model(path, tmp_path / "back")


def test_a_command_imports(known, tmp_path, capfd):
    _, out = known("llama")
    path = tmp_path / "m.gguf"
    bitstrata.export_model(out, path, format="gguf", bits=4, types="Q4_0", refit=True)
    capfd.readouterr()
    assert run(["import", str(path), "-o", str(tmp_path / "back"), "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["exact"] is True
    assert shown["format"] == "gguf"
    assert run(["generate", str(tmp_path / "back"), "the lazy", "--max-new-tokens", "3"]) == 0
