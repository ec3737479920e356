"""GPTQ, AWQ and compressed-tensors into planes: the same numbers, and refusals by name."""

from __future__ import annotations

import json

import pytest
import torch
from foreign import write_foreign
from safetensors.torch import load_file, save_file
from tiny_models import tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM

import bitstrata
from bitstrata.checkpoint import CheckpointReader, validate
from bitstrata.cli.main import run
from bitstrata.errors import ModelError, UsageError
from bitstrata.exchange.streams import pack_stream, unpack_stream
from bitstrata.planes import decode

CASES = [
    *(("gptq", bits, sym) for bits in (2, 3, 4, 8) for sym in (True, False) if (bits, sym) != (8, False)),
    ("gptq_v2", 4, False), ("gptq_v2", 2, True), ("awq", 4, False), ("awq", 4, True),
    ("compressed-tensors", 4, True), ("compressed-tensors", 4, False), ("compressed-tensors", 8, True),
]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("source") / "model")


@pytest.mark.parametrize("bits", range(1, 9))
def test_streams_of_codes(bits):
    for count in (1, 10, 31, 32, 33, 70):
        codes = torch.randint(0, 2**bits, (5, count), generator=torch.Generator().manual_seed(count))
        assert torch.equal(unpack_stream(pack_stream(codes, bits), bits, count).long(), codes)
    with pytest.raises(ValueError, match="are not 33 codes"):
        unpack_stream(torch.zeros(2, 10, dtype=torch.int32), bits, 33)


@pytest.mark.parametrize(("kind", "bits", "sym"), CASES)
def test_weights_are_the_same_numbers(kind, bits, sym, source, tmp_path):
    means = write_foreign(source, tmp_path / "theirs", kind, bits=bits, sym=sym)
    result = bitstrata.import_model(tmp_path / "theirs", tmp_path / "ours")
    assert result.exact
    assert validate(tmp_path / "ours") == []
    reader = CheckpointReader(tmp_path / "ours")
    assert set(reader.spec.layers) == set(means)
    assert reader.spec.bits[0] == bits
    assert reader.spec.bits[-1] == (bits if sym or bits == 2 else bits + 1)  # 1.5 - 1 and 1.5 - 2 need no more digits
    for name, expected in means.items():
        weight = reader.layer(name)
        assert torch.equal(decode(weight, max(weight.bits), torch.float64), expected), name
        assert torch.equal(decode(weight, max(weight.bits)), expected.float()), name
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, expected in means.items():
        plain.get_submodule(name).weight.data = expected.float()
    model = bitstrata.load(tmp_path / "ours", dtype=torch.float32)
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        found, expected = (one(input_ids=ids).logits for one in (model, plain))
    assert (found - expected).norm() / expected.norm() < 0.03  # kernels may round activations to 8 bits


def test_refit_rounds_offsets_and_has_no_plane_more(source, tmp_path):
    write_foreign(source, tmp_path / "theirs", "awq", sym=False)
    result = bitstrata.import_model(tmp_path / "theirs", tmp_path / "ours", refit=True)
    assert result.bits == (4,)
    assert 0 < result.relative_error < 2.0**-11
    write_foreign(source, tmp_path / "eight", "gptq", bits=8, sym=False)
    with pytest.raises(UsageError, match="more digits"):
        bitstrata.import_model(tmp_path / "eight", tmp_path / "none")
    assert bitstrata.import_model(tmp_path / "eight", tmp_path / "eight-ours", refit=True).bits == (8,)


def change(folder, **tensors):
    state = load_file(folder / "model.safetensors")
    for name, edit in tensors.items():
        found = next(key for key in state if key.endswith(name))
        value = edit(state.pop(found))
        if value is not None:
            state[found] = value.contiguous()
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def configure(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))


REFUSED = [
    ("gptq", lambda f: change(f, g_idx=lambda x: x.flip(0)), "act-order"),
    ("gptq", lambda f: change(f, scales=lambda x: x[:1]), r"not of the 32 that config\.json says"),
    ("gptq", lambda f: change(f, qzeros=lambda x: torch.full_like(x, -1)), "0 to some programs and 16 to others"),
    ("gptq", lambda f: change(f, qzeros=lambda x: None), r"lacks the tensor .*\.qzeros"),
    ("gptq", lambda f: change(f, qzeros=lambda x: x[:, :-1]), "not as its config says"),
    ("gptq", lambda f: change(f, norm=lambda x: x), "norm"),
    ("gptq", lambda f: configure(f, dynamic={"a": 1}), r"quantization_config\.dynamic is not known"),
    ("gptq", lambda f: configure(f, bits=5), "GPTQ of 5 bits"),
    ("gptq", lambda f: configure(f, checkpoint_format="marlin"), "format 'marlin'"),
    ("gptq", lambda f: configure(f, quant_method="quip"), "quantized by 'quip'"),
    ("awq", lambda f: configure(f, version="gemv"), "version 'gemv'"),
    ("compressed-tensors", lambda f: configure(f, format="marlin-24"), "format 'marlin-24'"),
    ("compressed-tensors", lambda f: configure(f, config_groups=3), "lacks or garbles"),
    ("compressed-tensors", lambda f: change(f, weight_scale=lambda x: x.double() * torch.pi), "more digits"),
    ("gptq", lambda f: (f / "model.safetensors").unlink(), "safetensors"),
    ("gptq", lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    ("gptq", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickles"),
]


@pytest.mark.parametrize(("kind", "damage", "said"), REFUSED, ids=[f"{one[0]}-{one[2]}" for one in REFUSED])
def test_what_is_not_held_is_named_and_nothing_is_left(kind, damage, said, source, tmp_path):
    folder = tmp_path / "theirs"
    write_foreign(source, folder, kind)
    if said == "norm":
        change(folder, **{"model.norm.weight": lambda x: None})
    else:
        damage(folder)
    with pytest.raises((ModelError, UsageError), match=said):
        bitstrata.import_model(folder, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_folders_of_other_kinds(source, tmp_path, capfd):
    with pytest.raises(ModelError, match="is not quantized"):
        bitstrata.import_model(source, tmp_path / "ours")
    bitstrata.quantize(source, tmp_path / "mine", bits="2", method="rtn", group_size=32)
    with pytest.raises(ModelError, match="checkpoint of bitstrata already"):
        bitstrata.import_model(tmp_path / "mine", tmp_path / "ours")
    write_foreign(source, tmp_path / "theirs", "gptq")
    capfd.readouterr()
    assert run(["import", str(tmp_path / "theirs"), "-o", str(tmp_path / "ours"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["bits"] == [4]
    assert run(["import", str(tmp_path / "theirs"), "-o", str(tmp_path / "ours")]) == 2
    assert "is there already" in capfd.readouterr().err


def test_gptq_there_and_back_is_exact(source, tmp_path):
    """Codes on a grid with whole zero points go out as they came in, with the numbers that they had."""
    means = write_foreign(source, tmp_path / "theirs", "gptq", sym=True)
    bitstrata.import_model(tmp_path / "theirs", tmp_path / "ours")
    result = bitstrata.export_model(tmp_path / "ours", tmp_path / "back", format="gptq")
    assert result.exact
    assert {one.type for one in result.layers} == {"gptq 4 bits"}
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    settings = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert settings["sym"] is True
    assert (settings["bits"], settings["group_size"], settings["checkpoint_format"]) == (4, 32, "gptq")
    assert len(means) == len(result.layers)


def test_gptq_export_refits_and_says_so(source, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    bitstrata.quantize(source, tmp_path / "ours", bits="2-4", method="rtn", group_size=32)
    with pytest.raises(UsageError, match=r"GPTQ does not hold.*relative error of 0\."):
        bitstrata.export_model(tmp_path / "ours", tmp_path / "none", format="gptq", bits=3)
    assert not (tmp_path / "none").exists()
    for bits in (2, 3, 4):
        out = tmp_path / f"gptq{bits}"
        result = bitstrata.export_model(tmp_path / "ours", out, format="gptq", bits=bits, refit=True, text=text)
        assert {2: 0.35, 3: 0.15, 4: 0.08}[bits] > result.relative_error > 1e-3
        assert result.kld > 0
        again = bitstrata.import_model(out, tmp_path / f"again{bits}")
        assert again.exact
        assert again.bits[0] == bits
        reader, back = CheckpointReader(tmp_path / "ours"), CheckpointReader(tmp_path / f"again{bits}")
        name = "model.layers.0.mlp.up_proj"
        weight, found = decode(reader.layer(name), bits), back.layer(name)
        error = (decode(found, max(found.bits)) - weight).norm() / weight.norm()
        own = next(one for one in result.layers if one.name == name)
        assert float(error) == pytest.approx(own.relative_error, rel=1e-4)


def test_gptq_in_8_bits_loses_little(source, tmp_path):
    bitstrata.quantize(source, tmp_path / "ours", bits="3", method="rtn", group_size=32)
    result = bitstrata.export_model(tmp_path / "ours", tmp_path / "eight", format="gptq", types="8", refit=True)
    assert {one.type for one in result.layers} == {"gptq 8 bits"}
    assert result.relative_error < 0.01
    for given in ("Q4_K", ["8", "4"]):
        with pytest.raises(UsageError, match="GPTQ has no type"):
            bitstrata.export_model(tmp_path / "ours", tmp_path / "none", format="gptq", types=given)
    with pytest.raises(UsageError, match="dense has no types"):
        bitstrata.export_model(tmp_path / "ours", tmp_path / "none", format="dense", types="8")
    with pytest.raises(UsageError, match="dtype is for dense"):
        bitstrata.export_model(tmp_path / "ours", tmp_path / "none", format="gptq", dtype="float16")


def test_gptq_export_refuses_by_name(source, tmp_path):
    bitstrata.quantize(source, tmp_path / "ours", bits="2-4", method="rtn", group_size=32)
    layers = CheckpointReader(tmp_path / "ours").spec.planned_layers
    plan = {name: 2 + index % 2 for index, name in enumerate(layers)}
    with pytest.raises(UsageError, match=r"one number for all layers, these have bits \[2, 3\]"):
        bitstrata.export_model(tmp_path / "ours", tmp_path / "none", format="gptq", bits=plan, refit=True)
    bitstrata.quantize(tiny_gpt2(tmp_path / "gpt2"), tmp_path / "gpt2-ours", bits="2", method="rtn", group_size=32)
    with pytest.raises(UsageError, match="no shape that GPTQ kernels take"):
        bitstrata.export_model(tmp_path / "gpt2-ours", tmp_path / "none", format="gptq", refit=True)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("sym", [True, False])
def test_what_compressed_tensors_itself_packs(sym, source, tmp_path):
    package = pytest.importorskip("compressed_tensors", reason="the compressed-tensors package is not installed")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor

    folder = tmp_path / "theirs"
    write_foreign(source, folder, "compressed-tensors", sym=sym)
    state, means = load_file(folder / "model.safetensors"), {}
    weights = package.quantization.QuantizationArgs(num_bits=4, symmetric=sym, strategy="group", group_size=32)
    scheme = package.quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    for name in [key.removesuffix(".weight_packed") for key in list(state) if key.endswith(".weight_packed")]:
        N, K = state[f"{name}.weight_shape"].tolist()
        generator = torch.Generator().manual_seed(N)
        layer = {
            "weight": torch.randn(N, K, generator=generator),
            "weight_scale": torch.rand(N, K // 32, generator=generator).half() * 0.2 + 0.1,
            "weight_zero_point": torch.randint(-6, 6, (N, K // 32), generator=generator, dtype=torch.int8),
        }
        if sym:
            layer["weight_zero_point"].zero_()
        packed = PackedQuantizationCompressor.compress(layer, scheme)
        means[name] = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
        for key in list(state):
            if key.startswith(f"{name}."):
                del state[key]
        state |= {f"{name}.{key}": tensor.contiguous() for key, tensor in packed.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert bitstrata.import_model(folder, tmp_path / "ours").exact
    reader = CheckpointReader(tmp_path / "ours")
    for name, expected in means.items():
        weight = reader.layer(name)
        found = decode(weight, max(weight.bits))
        assert torch.equal(found.to(expected.dtype), expected), name
