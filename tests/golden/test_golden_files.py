"""A file of every format version, written once by make_v<N>.py, read forever."""

from __future__ import annotations

import json
from pathlib import Path

import make_v1
import make_v2
import make_v3
import make_v4
import pytest
import torch
from safetensors.torch import load_file

from bitstrata.checkpoint import CheckpointReader, validate
from bitstrata.kernels import pack
from bitstrata.kernels.cpu import missing
from bitstrata.planes import decode

HERE = Path(__file__).parent
MAKERS = {"v1": make_v1, "v2": make_v2, "v3": make_v3, "v4": make_v4}
LAYERS = {
    "v1": {make_v1.AFFINE, make_v1.CODEBOOK}, "v2": set(make_v2.LAYERS), "v3": {make_v3.LAYER},
    "v4": set(make_v4.LAYERS),
}  # fmt: skip
BEFORE_CONFIG_DIGESTS = ("v1", "v2", "v3")


@pytest.fixture(params=MAKERS)
def version(request) -> str:
    return request.param


def expected(version):
    return load_file(HERE / f"{version}_expected.safetensors")


def test_it_is_valid(version):
    assert validate(HERE / version) == []


@pytest.mark.parametrize("max_bits", [2, 3, 4, 8])
def test_it_decodes_to_exactly_the_expected_weights(version, max_bits):
    reader = CheckpointReader(HERE / version, max_bits=max_bits, verify=True)
    assert set(reader.spec.linears) == LAYERS[version]
    weights = expected(version)
    seen = set()
    for layer in reader.spec.linears:
        for bits in reader.spec.layer_bits(layer, max_bits):
            seen.add(f"{layer}@{bits}")
            decoded = decode(reader.layer(layer), bits, torch.float64)
            assert torch.equal(decoded, weights[f"{layer}@{bits}"]), (layer, bits)
            if not missing:  # the kernels' layout keeps every bit of it
                again = pack(reader.layer(layer), kernel="scalar").stored()
                assert torch.equal(decode(again, bits, torch.float64), decoded), (layer, bits)
    if max_bits == 8:
        assert seen == set(weights)


def test_the_same_content_is_written_byte_for_byte_today(version, tmp_path):
    MAKERS[version].write(tmp_path / version)
    written = {path.name: path.read_bytes() for path in (tmp_path / version).iterdir()}
    assert written.keys() == {path.name for path in (HERE / version).iterdir()}
    index = json.loads(written["model.safetensors.index.json"])
    config = json.loads(written["config.json"])
    if version in BEFORE_CONFIG_DIGESTS:
        assert index["metadata"].pop("config_sha256").keys() == config.keys()
    written["model.safetensors.index.json"] = (json.dumps(index, indent=2) + "\n").encode()
    for name, data in written.items():
        assert data == (HERE / version / name).read_bytes(), name


@pytest.mark.parametrize("version", BEFORE_CONFIG_DIGESTS)
def test_files_older_than_digests_of_the_config_are_read_and_said_to_have_none(version):
    reader = CheckpointReader(HERE / version, verify=True)
    assert (reader.has_digests, reader.covers_config, reader.changed_config) == (True, False, ())


def test_the_expected_weights_follow_from_the_definition(version):
    for name, tensor in expected(version).items():
        layer, _, bits = name.partition("@")
        where = (int(bits),) if version == "v3" else (layer, int(bits))  # v3 has one layer
        assert torch.equal(tensor, MAKERS[version].expected_weight(*where)), name


def test_v1_unquantized_tensors_are_as_they_were():
    reader = CheckpointReader(HERE / "v1")
    assert torch.equal(reader.read("model.embed_tokens.weight"), torch.arange(12).view(4, 3).bfloat16())
    assert reader.read(f"{make_v1.AFFINE}.bias").tolist() == [0.0, 0.25, -0.5, 1.0, -2.0]
    assert reader.read(f"{make_v1.CODEBOOK}.weight").shape == (0,)


def test_a_word_of_v1_is_where_the_format_says():
    """Bit b of word w is column 32 w + b: read here without any of our code."""
    words = load_file(HERE / "v1" / "model-plane-1.safetensors")[f"{make_v1.AFFINE}.plane_1"]
    assert words.shape == (5, 3)
    for n, k in [(0, 0), (1, 31), (2, 32), (4, 69)]:
        assert (words[n, k // 32].item() >> (k % 32)) & 1 == make_v1.bit(make_v1.AFFINE, 1, n, k)


def test_v2_roles_are_as_they_were():
    spec = CheckpointReader(HERE / "v2", max_bits=2).spec
    assert (spec.layers[make_v2.EMBEDDING].role, spec.layers[make_v2.EMBEDDING].tied) == ("embedding", "lm_head")
    assert (spec.layers[make_v2.HEAD].role, spec.layers[make_v2.HEAD].tied) == ("head", None)
    assert spec.layers[make_v2.LINEAR].role is None
    assert spec.layer_bits(make_v2.EMBEDDING, 2) == (5,)


def test_v4_experts_are_stored_one_after_the_other():
    planes = load_file(HERE / "v4" / "model-plane-1.safetensors")[f"{make_v4.STORED}.plane_1"]
    assert planes.shape == (3, 5, 3)
    for e, n, k in [(0, 0, 0), (1, 1, 31), (2, 2, 32), (2, 4, 69)]:
        assert (planes[e, n, k // 32].item() >> (k % 32)) & 1 == make_v1.bit(make_v4.LAYERS[e], 1, n, k)
    reader = CheckpointReader(HERE / "v4")
    assert reader.read(f"{make_v4.STORED}.bias")[2].tolist() == [2.5, 2.75, 3.0, 3.25, 3.5]
    assert reader.read(f"{make_v4.STORED}.weight").shape == (0,)
