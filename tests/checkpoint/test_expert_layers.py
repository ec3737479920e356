"""Layers of several experts: stored as one tensor each, read and checked one expert at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from damage import edit_spec, replace_file, set_field, set_layer
from helpers import assert_same_weight, random_weight
from safetensors.torch import load_file, save_file

from bitstrata.checkpoint import (
    CheckpointReader,
    LayerSpec,
    QuantizationSpec,
    TensorEntry,
    entries_of,
    format_version,
    merge_experts,
    validate,
    write_checkpoint,
)
from bitstrata.errors import CheckpointError
from bitstrata.plans.page_reader import PageReader

STORED, COUNT = "m.experts.up_proj", 3
NAMES = [f"m.experts.{expert}.up_proj" for expert in range(COUNT)]
KINDS = ("affine", "affine8", "codebook")


def spec(kind: str = "affine") -> QuantizationSpec:
    layers = {STORED: LayerSpec(in_features=70, out_features=5, decoder=kind, experts=COUNT, active=2)}
    layers["m.q"] = LayerSpec(in_features=70, out_features=5, decoder=kind)
    return QuantizationSpec(
        format_version=format_version(layers.values()), method="test", bits=[2, 3], group_size=32, layers=layers
    )


def weights(kind: str):
    names = [*NAMES, "m.q"]
    return {name: random_weight(5, 70, (2, 3), 32, kind, seed=index) for index, name in enumerate(names)}


def save(folder: Path, kind: str = "affine"):
    held = weights(kind)
    entries = [entry for name, weight in held.items() for entry in entries_of(name, weight)]
    entries += [TensorEntry.of(f"{name}.weight", torch.empty(0)) for name in held]
    config = {"model_type": "test", "quantization_config": spec(kind).model_dump(exclude_none=True)}
    write_checkpoint(folder, config, merge_experts(spec(kind), entries))
    return held


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(  # so that what is changed is judged by what it says
        (tmp_path / "model.safetensors.index.json").read_text().replace("sha256", "other")
    )
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_comes_back_as_it_was(tmp_path, kind):
    held = save(tmp_path, kind)
    reader = CheckpointReader(tmp_path, verify=True)
    assert reader.spec.format_version == 4
    assert reader.spec.planned_layers == tuple(held)
    for name, weight in held.items():
        assert_same_weight(reader.layer(name), weight)
    assert reader.state_dict()[f"{STORED}.plane_0"].shape == (COUNT, 5, 3)
    assert validate(tmp_path) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_one_experts_and_no_more_is_read(tmp_path, kind):
    held = save(tmp_path, kind)
    pages = PageReader(CheckpointReader(tmp_path, paged=True))
    planes, scales = pages.pages(NAMES[1], 1, 3)
    assert torch.equal(torch.stack(planes), torch.stack(held[NAMES[1]].planes[1:3]))
    for name in scales.output_dims:
        assert torch.equal(getattr(scales, name), getattr(held[NAMES[1]].scales[3], name))
    assert pages.bytes_read == pages.page_bytes(NAMES[1], 1, 3)


def test_bytes_read_count_the_active_experts():
    one = spec().prefix_bytes("m.q", 2)
    assert spec().bytes_read(2) == 3 * one
    assert spec().weights_read == 3 * 350
    assert spec().weight_count == 4 * 350
    assert spec().layer_bytes(STORED) == 3 * spec().layer_bytes("m.q")


def test_files_without_experts_keep_their_version():
    assert format_version([LayerSpec(in_features=4, out_features=4)]) == 1


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(set_field("format_version", 3), "m.experts.up_proj: experts need format_version 4", id="version"),
        pytest.param(set_layer("experts", 4, STORED), r"expected I32 \[4, 5, 3\], found I32 \[3, 5, 3\]", id="more"),
        pytest.param(set_layer("experts", 0, STORED), "experts", id="none"),
        pytest.param(set_layer("experts", 10**6, STORED), "1000000 experts are more than", id="absurd"),
        pytest.param(set_layer("active", 4, STORED), "4 of 3 experts cannot be active", id="active"),
        pytest.param(set_layer("active", 1, "m.q"), "only experts can be active", id="active-without"),
        pytest.param(
            edit_spec(lambda raw: raw["layers"].update({NAMES[0]: raw["layers"]["m.q"]})),
            "an expert has the name of another layer",
            id="name-twice",
        ),
    ],
)
def test_a_description_that_is_wrong_is_refused(folder, damage, words):
    damage(folder)
    with pytest.raises(CheckpointError, match=words):
        CheckpointReader(folder)
    assert validate(folder)


def test_a_plane_that_is_cut_off_is_named(folder):
    path = folder / "model-plane-1.safetensors"
    replace_file(path, path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"model-plane-1\.safetensors is not a whole safetensors file"):
        CheckpointReader(folder)


def test_a_plane_of_too_few_experts_is_named(folder):
    path = folder / "model-plane-1.safetensors"
    tensors = load_file(path)
    tensors[f"{STORED}.plane_1"] = tensors[f"{STORED}.plane_1"][:2].clone()
    path.unlink()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"m\.experts\.up_proj\.plane_1 in .*expected I32 \[3, 5, 3\], found"):
        CheckpointReader(folder)


def test_the_expert_with_a_bad_value_is_named(folder):
    path = folder / "model-plane-0.safetensors"
    tensors = load_file(path)
    tensors[f"{STORED}.plane_0"][2, 1, 2] |= 1 << 20
    path.unlink()
    save_file(tensors, path)
    assert f"{NAMES[2]}.plane_0: padding bits past column 69 are set" in validate(folder)


def test_an_expert_that_lacks_a_tensor_is_not_written():
    entries = [entry for name in NAMES[:2] for entry in entries_of(name, weights("affine")[name])]
    with pytest.raises(ValueError, match=r"experts \[0, 1\] of 3 have it"):
        merge_experts(spec(), entries)
