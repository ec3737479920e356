"""Files of format version 2, written once, read forever."""

from __future__ import annotations

from pathlib import Path

import make_v2
import pytest
import torch
from safetensors.torch import load_file

from bitstrata.checkpoint import CheckpointReader, validate
from bitstrata.planes import decode

HERE = Path(__file__).parent
FOLDER, EXPECTED = HERE / "v2", HERE / "v2_expected.safetensors"


def test_it_is_valid():
    assert validate(FOLDER) == []


@pytest.mark.parametrize("max_bits", [2, 3, 8])
def test_it_decodes_to_exactly_the_expected_weights(max_bits):
    expected = load_file(EXPECTED)
    reader = CheckpointReader(FOLDER, max_bits=max_bits, verify=True)
    assert set(reader.spec.layers) == set(make_v2.LAYERS)
    for layer in reader.spec.layers:
        for bits in reader.spec.layer_bits(layer, max_bits):
            assert torch.equal(decode(reader.layer(layer), bits, torch.float64), expected[f"{layer}@{bits}"]), layer
    assert reader.spec.layer_bits(make_v2.EMBEDDING, max_bits) == (5,)


def test_roles_are_as_they_were():
    layers = CheckpointReader(FOLDER).spec.layers
    assert (layers[make_v2.EMBEDDING].role, layers[make_v2.EMBEDDING].tied) == ("embedding", "lm_head")
    assert (layers[make_v2.HEAD].role, layers[make_v2.HEAD].tied) == ("head", None)
    assert layers[make_v2.LINEAR].role is None


def test_the_same_content_is_written_byte_for_byte_today(tmp_path):
    make_v2.write(tmp_path / "v2")
    written = {path.name: path.read_bytes() for path in (tmp_path / "v2").iterdir()}
    assert written.keys() == {path.name for path in FOLDER.iterdir()}
    for name, data in written.items():
        assert data == (FOLDER / name).read_bytes(), name


def test_the_expected_weights_follow_from_the_definition():
    for name, tensor in load_file(EXPECTED).items():
        layer, _, bits = name.partition("@")
        assert torch.equal(tensor, make_v2.expected_weight(layer, int(bits))), name
