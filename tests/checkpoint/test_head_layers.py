"""Layers with a role in the schema: an output head and an embedding at a precision of their own."""

from __future__ import annotations

import json

import pytest

from bitstrata.checkpoint import LayerSpec, QuantizationSpec
from bitstrata.checkpoint.schema import HEAD_SHARD, HEAD_VERSION, shard_of
from bitstrata.errors import CheckpointError

INSIDE = {"a": LayerSpec(in_features=64, out_features=5)}
HEAD = LayerSpec(in_features=64, out_features=40, bits=[6], role="head", bias=True)
EMBEDDING = LayerSpec(in_features=64, out_features=40, bits=[5], role="embedding")
TIED = LayerSpec(in_features=64, out_features=40, bits=[6], role="embedding", tied="head")
PLANE, SCALES = 40 * 2 * 4, 40 * 2 * 2  # bytes of a plane, and of one scale or offset for each group


def spec(**layers):
    return QuantizationSpec(
        format_version=HEAD_VERSION, method="test", bits=[2, 3], group_size=32, layers={**INSIDE, **layers}
    )


def test_it_survives_json():
    made = spec(embedding=TIED)
    assert QuantizationSpec.parse(json.loads(json.dumps(made.model_dump(exclude_none=True))), "here") == made


def test_a_head_is_read_whole_at_any_bits_and_an_embedding_not_at_all():
    plain = spec().bytes_read(2)
    assert spec(head=HEAD, embedding=EMBEDDING).bytes_read(2) == plain + 6 * PLANE + 7 * SCALES
    assert spec(embedding=TIED).bytes_read(2) == plain + 6 * PLANE + 7 * SCALES
    assert spec(head=HEAD, embedding=EMBEDDING).weight_count == 5 * 64 + 40 * 64
    assert spec(head=HEAD, embedding=EMBEDDING).layer_bytes("embedding") == 5 * PLANE + 6 * SCALES


@pytest.mark.parametrize("max_bits", [1, 2, 8])
def test_max_bits_leaves_them_whole(max_bits):
    made = spec(head=HEAD, embedding=EMBEDDING)
    assert len(made.layer_tensors("head", max_bits)) == 6 + 2
    assert made.layer_bits("embedding", max_bits) == (5,)
    assert made.whole_layers == {"head", "embedding"}


def test_their_planes_have_a_file_of_their_own():
    whole = spec(head=HEAD).whole_layers
    assert shard_of("head.plane_5", whole) == shard_of("head.scale_6", whole) == HEAD_SHARD
    assert shard_of("head.weight", whole) == shard_of("head.bias", whole) == "model-common.safetensors"
    assert shard_of("a.plane_1", whole) == "model-plane-1.safetensors"


WRONG = {
    "no bits": ({"head": HEAD.model_copy(update={"bits": None})}, "exactly one bits value"),
    "two bits": ({"head": HEAD.model_copy(update={"bits": [4, 6]})}, "exactly one bits value"),
    "bits above 8": ({"head": HEAD.model_copy(update={"bits": [9]})}, "within 1..8"),
    "a tied head": ({"head": HEAD.model_copy(update={"tied": "a"})}, "only an embedding can be tied"),
    "a tied linear": ({"b": INSIDE["a"].model_copy(update={"tied": "a"})}, "only an embedding can be tied"),
    "an embedding with a bias": ({"e": EMBEDDING.model_copy(update={"bias": True})}, "an embedding has no bias"),
    "two sets of planes for one head": ({"e": TIED, "head": HEAD}, "must not have planes of its own"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_make_sense_is_refused(name):
    layers, said = WRONG[name]
    raw = spec().model_dump(exclude_none=True)
    raw["layers"] |= {key: layer.model_dump(exclude_none=True) for key, layer in layers.items()}
    with pytest.raises(CheckpointError, match=said):
        QuantizationSpec.parse(raw, "here")


def test_an_unknown_role_and_a_role_in_version_1_are_refused():
    raw = spec(head=HEAD).model_dump(exclude_none=True)
    with pytest.raises(CheckpointError, match="needs format_version 2"):
        QuantizationSpec.parse({**raw, "format_version": 1}, "here")
    raw["layers"]["head"]["role"] = "tail"
    with pytest.raises(CheckpointError, match=r"layers\.head\.role"):
        QuantizationSpec.parse(raw, "here")
