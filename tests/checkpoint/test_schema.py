"""QuantizationSpec: which tensors a checkpoint holds, and round trips through JSON."""

from __future__ import annotations

import json

import pytest

from bitstrata.checkpoint import FORMAT_VERSION, LayerSpec, QuantizationSpec
from bitstrata.checkpoint.schema import guard_name
from bitstrata.errors import CheckpointError


@pytest.fixture
def spec():
    return QuantizationSpec(
        method="test",
        method_options={"sweeps": 3, "ridge": 1e-4},
        bits=[2, 3],
        group_size=32,
        layers={
            "a": LayerSpec(in_features=70, out_features=5, bias=True),
            "b": LayerSpec(in_features=64, out_features=3, decoder="codebook", bits=[2, 3, 8], group_size=16),
        },
        provenance={"model": "somewhere"},
    )


def test_parse_inverts_dump_through_json(spec):
    raw = json.loads(json.dumps(spec.model_dump(exclude_none=True)))
    assert QuantizationSpec.parse(raw, "here") == spec
    assert raw["format_version"] == 1 < FORMAT_VERSION == 4
    assert "bits" not in raw["layers"]["a"]


def test_names_dtypes_and_shapes_of_an_affine_layer(spec):
    assert spec.layer_tensors("a") == {
        "a.plane_0": ("I32", (5, 3)),
        "a.plane_1": ("I32", (5, 3)),
        "a.plane_2": ("I32", (5, 3)),
        "a.scale_2": ("F16", (2, 5, 3)),
        "a.offset_2": ("F16", (5, 3)),
        "a.scale_3": ("F16", (3, 5, 3)),
        "a.offset_3": ("F16", (5, 3)),
    }


def test_a_layer_may_have_more_bits_and_another_group_size(spec):
    assert spec.layer_bits("a") == (2, 3)
    assert spec.layer_bits("b") == (2, 3, 8)
    assert (spec.layer_group_size("a"), spec.layer_group_size("b")) == (32, 16)
    tensors = spec.layer_tensors("b")
    assert sum("plane" in name for name in tensors) == 8
    assert tensors["b.table_8"] == ("F16", (3, 256))


@pytest.mark.parametrize(("max_bits", "count"), [(8, 7), (3, 7), (2, 4), (1, 0)])
def test_max_bits_cuts_planes_and_scales(spec, max_bits, count):
    assert len(spec.layer_tensors("a", max_bits)) == count


def test_bytes_read_counts_the_prefix_and_one_scales(spec):
    a = 2 * 5 * 3 * 4 + (2 + 1) * 5 * 3 * 2
    b = 2 * 3 * 2 * 4 + 3 * 4 * 2
    assert spec.bytes_read(2) == a + b
    assert spec.weight_count == 5 * 70 + 3 * 64


def test_guards_stand_under_the_original_name():
    assert guard_name("model.layers.0.q_proj") == "model.layers.0.q_proj.weight"


@pytest.mark.parametrize("raw", [None, [], "bitstrata", {}, {"quant_method": None}], ids=repr)
def test_anything_that_does_not_claim_to_be_ours_is_refused_with_a_hint(raw):
    with pytest.raises(CheckpointError, match="here is not a bitstrata checkpoint") as caught:
        QuantizationSpec.parse(raw, "here")
    assert "bitstrata quantize" in caught.value.hint


def test_a_future_version_is_refused_before_its_unknown_fields(spec):
    raw = {**spec.model_dump(exclude_none=True), "format_version": 7, "invented_later": 1}
    with pytest.raises(CheckpointError, match="format_version 7") as caught:
        QuantizationSpec.parse(raw, "here")
    assert "upgrade" in caught.value.hint
