"""Export to GGUF, read back by the gguf package: what is in the file, which types layers get, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import random_weight
from known_models import TEMPLATE
from tiny_models import tiny_llama, tiny_mixtral

import bitstrata
from bitstrata.checkpoint import CheckpointReader
from bitstrata.cli.main import run
from bitstrata.errors import ResourceError, UsageError
from bitstrata.exchange import folder
from bitstrata.exchange.gguf_model import turned_rows
from bitstrata.exchange.gguf_types import Asked, encode, read_back
from bitstrata.planes import decode

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed (extra gguf)")


def read(path):
    """Metadata, and tensors as numbers, of a file."""
    reader = gguf.GGUFReader(path)
    tensors = {
        one.name: torch.from_numpy(gguf.quants.dequantize(one.data, one.tensor_type).copy()) for one in reader.tensors
    }
    kinds = {one.name: one.tensor_type.name for one in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors, kinds


def test_weights_and_metadata_are_those_of_the_model(known, tmp_path):
    _, out = known("llama")
    result = bitstrata.export_model(out, tmp_path / "m.gguf", format="gguf", bits=2, types="F32")
    fields, tensors, kinds = read(tmp_path / "m.gguf")
    reader, config = CheckpointReader(out), json.loads((out / "config.json").read_text())
    assert result.exact
    assert result.bytes == (tmp_path / "m.gguf").stat().st_size
    assert fields["llama.embedding_length"] == config["hidden_size"]
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert fields["tokenizer.chat_template"] == TEMPLATE
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert len(fields["tokenizer.ggml.tokens"]) == config["vocab_size"]
    assert fields["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED
    down = decode(reader.layer("model.layers.1.mlp.down_proj"), 2)
    assert torch.equal(tensors["blk.1.ffn_down.weight"], down)
    q = decode(reader.layer("model.layers.0.self_attn.q_proj"), 2)  # [64, 64], 4 heads of 16
    turned = q.view(4, 2, 8, 64).transpose(1, 2).reshape(64, 64)
    assert torch.equal(tensors["blk.0.attn_q.weight"], turned)
    assert "output.weight" not in tensors  # tied
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_norms_of_gemma_have_their_one(known, tmp_path):
    _, out = known("gemma3")
    bitstrata.export_model(out, tmp_path / "m.gguf", format="gguf", bits=2, types="F32")
    _, tensors, _ = read(tmp_path / "m.gguf")
    stored = CheckpointReader(out).read("model.norm.weight")
    assert torch.equal(tensors["output_norm.weight"], stored + 1)


def test_held_layers_keep_their_codes(known, tmp_path):
    """rtn is on a uniform grid: without --refit the codes stay, and the error is that of fp16."""
    _, out = known("llama-wide")
    for bits in (2, 3, 4):
        result = bitstrata.export_model(out, tmp_path / f"{bits}.gguf", format="gguf", bits=bits)
        assert {one.type for one in result.layers} == {"Q4_1"}
        assert 0 < result.relative_error < 2.0**-10
        assert not result.exact


def test_refit_takes_the_usual_type_and_says_the_loss(known, tmp_path):
    _, out = known("llama-wide")
    text = tmp_path / "text.txt"
    text.write_text("the lazy dogs jump over them. " * 20)
    found = {}
    for bits in (2, 3):
        path = tmp_path / f"{bits}.gguf"
        result = bitstrata.export_model(out, path, format="gguf", bits=bits, refit=True, text=text)
        found[bits] = result
        assert result.tokens > 50
        assert result.kld > 0
        _, tensors, kinds = read(path)
        assert kinds["blk.0.ffn_down.weight"] == {2: "Q2_K", 3: "Q3_K"}[bits]
        weight = decode(CheckpointReader(out).layer("model.layers.0.mlp.down_proj"), bits)
        own = next(one for one in result.layers if one.name == "model.layers.0.mlp.down_proj")
        measured = float((tensors["blk.0.ffn_down.weight"] - weight).norm() / weight.norm())
        assert own.relative_error == pytest.approx(measured, rel=1e-4)
        assert f"relative error of all quantized weights {result.relative_error:.2e}" in str(result)
    held = bitstrata.export_model(out, tmp_path / "held.gguf", format="gguf", bits=2, text=text)
    assert held.kld < found[2].kld / 100


def test_types_by_pattern_and_plan(known, tmp_path):
    _, out = known("llama-wide")
    spec = CheckpointReader(out).spec
    plan = {name: 4 if "layers.0." in name else 2 for name in spec.planned_layers}
    asked = ["Q6_K", "*.down_proj=Q8_0", "model.embed_tokens=Q8_0"]
    result = bitstrata.export_model(out, tmp_path / "m.gguf", format="gguf", bits=plan, types=asked, refit=True)
    kinds = read(tmp_path / "m.gguf")[2]
    assert kinds["blk.1.ffn_down.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_up.weight"] == "Q6_K"
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["output.weight"] == "F32"
    assert {one.bits for one in result.layers if "layers.1." in one.name} == {2}
    assert any("model.embed_tokens.weight" in note for note in result.notes)
    assert Asked.parse(["a.*=Q4_0", "a.b=q5_0"]).of("a.b") == "Q5_0"


def test_a_nested_grid_without_offset_is_exact_as_q8_0():
    weight = random_weight(16, 64, (4,), 32, "affine")
    scale = weight.scales[4]
    even = scale.scale[-1:] * torch.tensor([8, 4, 2, 1]).view(4, 1, 1)
    weight = type(weight)(weight.planes, {4: type(scale)(even.half(), scale.offset * 0)}, 64, 32)
    values = decode(weight, 4)
    assert torch.equal(read_back("Q8_0", encode("Q8_0", values, weight, 4)), values)


@pytest.mark.parametrize("kind", ["affine", "codebook"])
def test_levels_on_no_grid_need_refit(kind, tmp_path, known, capfd):
    from bitstrata.exchange.gguf_types import choose_types

    weight = random_weight(16, 64, (3,), 32, kind)

    class One:
        bits = {"layer": 3}  # noqa: RUF012

        class reader:  # noqa: N801
            class spec:  # noqa: N801
                linears = {"layer": ("layer", None)}  # noqa: RUF012

        @staticmethod
        def layer(name):
            return weight

    with pytest.raises(UsageError, match=r"does not hold 1 of 1 layers.*relative error of 0\.") as refused:
        choose_types(One, Asked(()), refit=False)
    assert "--refit" in refused.value.hint
    assert choose_types(One, Asked(()), refit=True) == {"layer": "IQ4_NL"}
    assert choose_types(One, Asked.parse("F32"), refit=False) == {"layer": "F32"}


def test_rows_are_turned_and_back():
    class Config:
        num_attention_heads, num_key_value_heads, head_dim, hidden_size = 4, 2, 6, 24

    order = turned_rows("a.k_proj", Config)
    assert order.tolist()[:6] == [0, 3, 1, 4, 2, 5]
    assert sorted(order.tolist()) == list(range(12))
    assert turned_rows("a.v_proj", Config) is None


def test_refusals_name_what_is_unknown(known, tmp_path, monkeypatch, capfd):
    _, out = known("llama")
    target = tmp_path / "m.gguf"
    for given, said in (
        ({"types": "Q9_K"}, "type 'Q9_K'"),
        ({"types": "Q4_K", "refit": True}, "rows of 64, which blocks of 256"),
        ({"types": "*.nothing=Q8_0"}, "matches no layer"),
        ({"types": "Q4_0"}, "does not hold"),
    ):
        with pytest.raises(UsageError, match=said):
            bitstrata.export_model(out, target, format="gguf", bits=4, **given)
    for name, make, said in (
        ("moe", tiny_mixtral, "experts"),
        ("words", tiny_llama, "a tokenizer of type WordLevel"),
    ):
        bitstrata.quantize(make(tmp_path / name), tmp_path / f"{name}-out", bits="2", method="rtn", group_size=32)
        with pytest.raises(UsageError, match=said):
            bitstrata.export_model(tmp_path / f"{name}-out", target, format="gguf", refit=True)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: folder.shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ResourceError):
        bitstrata.export_model(out, target, format="gguf")
    monkeypatch.undo()
    capfd.readouterr()
    assert run(["export", str(out), "--format", "gguf", "--type", "Q4_0", "-o", str(target)]) == 2
    assert "--refit" in capfd.readouterr().err
    assert not target.exists()
    assert not list(tmp_path.glob("*tmp*"))


def test_without_the_package_it_says_so(known, tmp_path, monkeypatch):
    import sys

    _, out = known("llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match="need the gguf package"):
        bitstrata.export_model(out, tmp_path / "m.gguf", format="gguf")
