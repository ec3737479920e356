"""What is written is what is read, and only what is needed is read."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from helpers import assert_same_weight, random_weight, save_checkpoint, spec_of
from hypothesis import given
from hypothesis import strategies as st
from randomness import examples

from bitstrata.checkpoint import CheckpointReader, TensorEntry, entries_of, is_checkpoint, validate, write_json
from bitstrata.checkpoint.writer import write_safetensors
from bitstrata.errors import CheckpointError, UnsupportedBitsError
from bitstrata.planes import decode

BITS = st.sets(st.integers(1, 8), min_size=1, max_size=3).map(sorted).map(tuple)


@st.composite
def models(draw):
    """Layers of any size, kind, group size; some with more bits than the model."""
    bits = draw(BITS)
    layers = {}
    for name in draw(st.sampled_from([["a"], ["model.layers.0.mlp.up_proj", "lm_head"]])):
        layers[name] = random_weight(
            N=draw(st.integers(1, 5)),
            K=draw(st.one_of(st.sampled_from([1, 31, 32, 33, 70]), st.integers(1, 150))),
            bits=draw(st.one_of(st.just(bits), BITS.map(lambda more: tuple(sorted({*bits, *more}))))),
            group_size=draw(st.sampled_from([1, 32, 43, 128, 1000])),
            kind=draw(st.sampled_from(["affine", "affine8", "codebook"])),
            seed=draw(st.integers(0, 2**31)),
        )
    return layers, bits


@examples(25)
@given(models())
def test_any_layer_reads_back_equal_at_every_bits(model):
    layers, bits = model
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), layers, bits=bits)
        assert validate(folder) == []
        for most in bits:
            reader = CheckpointReader(folder, max_bits=most, verify=True)
            assert reader.bits == tuple(b for b in bits if b <= most)
            for name, weight in layers.items():
                assert_same_weight(reader.layer(name), weight.prefix(most))


@pytest.fixture
def folder(tmp_path):
    layers = {"a": random_weight(5, 70, seed=1), "b": random_weight(3, 33, kind="codebook", seed=2)}
    save_checkpoint(tmp_path / "out", layers, common={"norm.weight": torch.arange(4.0)})
    return tmp_path / "out"


def test_files_are_split_by_concern(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model-bits-2.safetensors",
        "model-bits-3.safetensors",
        "model-bits-4.safetensors",
        "model-common.safetensors",
        "model-plane-0.safetensors",
        "model-plane-1.safetensors",
        "model-plane-2.safetensors",
        "model-plane-3.safetensors",
        "model.safetensors.index.json",
    ]


def test_max_bits_needs_no_file_above_it(folder):
    (folder / "model-plane-3.safetensors").unlink()
    (folder / "model-bits-4.safetensors").unlink()
    reader = CheckpointReader(folder, max_bits=3, verify=True)
    assert reader.bits == (2, 3)
    assert_same_weight(reader.layer("a"), random_weight(5, 70, seed=1).prefix(3))
    assert not any("plane_3" in name or name.endswith("_4") for name in reader.state_dict())
    with pytest.raises(CheckpointError, match=r"shard model-(plane-3|bits-4)\.safetensors is missing"):
        CheckpointReader(folder)


def test_max_bits_between_the_supported_ones_uses_the_next_lower(tmp_path):
    weight = random_weight(2, 33, bits=(2, 4))
    save_checkpoint(tmp_path, {"a": weight}, bits=(2, 4))
    for path in (*tmp_path.glob("model-plane-[23]*"), tmp_path / "model-bits-4.safetensors"):
        path.unlink()
    assert_same_weight(CheckpointReader(tmp_path, max_bits=3).layer("a"), weight.prefix(2))


@pytest.mark.parametrize("max_bits", [1, 0, -1])
def test_max_bits_below_the_least_is_unsupported_and_lists_what_there_is(folder, max_bits):
    with pytest.raises(UnsupportedBitsError) as caught:
        CheckpointReader(folder, max_bits=max_bits)
    assert caught.value.hint == "supported bits: 2, 3, 4"


def test_an_unknown_layer_is_refused_by_name(folder):
    with pytest.raises(CheckpointError, match="no quantized layer ghost"):
        CheckpointReader(folder).layer("ghost")


def test_state_dict_holds_common_tensors_guards_and_layers(folder):
    reader = CheckpointReader(folder)
    state = reader.state_dict()
    assert reader.common_names() == {"norm.weight", "a.weight", "b.weight"}
    expected = {f"a.{name}" for name in random_weight(5, 70).tensors()}
    expected |= {f"b.{name}" for name in random_weight(3, 33, kind="codebook").tensors()}
    assert state.keys() == expected | reader.common_names()
    assert torch.equal(state["norm.weight"], torch.arange(4.0))
    assert state["a.weight"].shape == (0,)
    assert reader.missing_guards() == []


def test_decoded_weights_survive_the_way_through_the_file(folder):
    layer = CheckpointReader(folder).layer("b")
    original = random_weight(3, 33, kind="codebook", seed=2)
    for bits in (2, 3, 4):
        assert torch.equal(decode(layer, bits, torch.float64), decode(original, bits, torch.float64))


def test_one_file_without_an_index_is_read_too(tmp_path, seed):
    weight = random_weight(5, 70, seed=seed)
    entries = [*entries_of("a", weight), TensorEntry.of("a.weight", torch.empty(0))]
    write_safetensors(tmp_path / "model.safetensors", entries)
    spec = spec_of({"a": weight}, (2, 3, 4), 32).model_dump(exclude_none=True)
    write_json(tmp_path / "config.json", {"quantization_config": spec})
    assert_same_weight(CheckpointReader(tmp_path, verify=True).layer("a"), weight)
    assert validate(tmp_path) == []


def test_an_index_without_digests_is_read_with_verify(folder):
    reader = CheckpointReader(folder)
    write_json(folder / "model.safetensors.index.json", {"weight_map": reader.weight_map})
    assert CheckpointReader(folder, verify=True).bits == (2, 3, 4)


def test_is_checkpoint_looks_at_the_quant_method(folder, tmp_path):
    assert is_checkpoint(folder)
    assert not is_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", {"quantization_config": {"quant_method": "awq"}})
    assert not is_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert not is_checkpoint(tmp_path)
