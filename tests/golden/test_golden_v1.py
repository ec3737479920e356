"""Files of format version 1, written once, read forever."""

from __future__ import annotations

from pathlib import Path

import make_v1
import pytest
import torch
from safetensors.torch import load_file

from bitstrata.checkpoint import CheckpointReader, validate
from bitstrata.planes import decode

HERE = Path(__file__).parent
FOLDER, EXPECTED = HERE / "v1", HERE / "v1_expected.safetensors"


def test_it_is_valid():
    assert validate(FOLDER) == []


@pytest.mark.parametrize("max_bits", [2, 3, 4])
def test_it_decodes_to_exactly_the_expected_weights(max_bits):
    expected = load_file(EXPECTED)
    reader = CheckpointReader(FOLDER, max_bits=max_bits, verify=True)
    assert reader.bits == tuple(range(2, max_bits + 1))
    assert set(reader.spec.layers) == {make_v1.AFFINE, make_v1.CODEBOOK}
    for layer in reader.spec.layers:
        for bits in reader.bits:
            decoded = decode(reader.layer(layer), bits, torch.float64)
            assert torch.equal(decoded, expected[f"{layer}@{bits}"]), (layer, bits)


def test_its_unquantized_tensors_are_as_they_were():
    reader = CheckpointReader(FOLDER)
    assert torch.equal(reader.read("model.embed_tokens.weight"), torch.arange(12).view(4, 3).bfloat16())
    assert reader.read(f"{make_v1.AFFINE}.bias").tolist() == [0.0, 0.25, -0.5, 1.0, -2.0]
    assert reader.read(f"{make_v1.CODEBOOK}.weight").shape == (0,)


def test_a_word_of_it_is_where_the_format_says():
    """Bit b of word w is column 32 w + b: read here without any of our code."""
    words = load_file(FOLDER / "model-plane-1.safetensors")[f"{make_v1.AFFINE}.plane_1"]
    assert words.shape == (5, 3)
    for n, k in [(0, 0), (1, 31), (2, 32), (4, 69)]:
        assert (words[n, k // 32].item() >> (k % 32)) & 1 == make_v1.bit(make_v1.AFFINE, 1, n, k)


def test_the_same_content_is_written_byte_for_byte_today(tmp_path):
    make_v1.write(tmp_path / "v1")
    written = {path.name: path.read_bytes() for path in (tmp_path / "v1").iterdir()}
    assert written.keys() == {path.name for path in FOLDER.iterdir()}
    for name, data in written.items():
        assert data == (FOLDER / name).read_bytes(), name


def test_the_expected_weights_follow_from_the_definition():
    for name, tensor in load_file(EXPECTED).items():
        layer, _, bits = name.partition("@")
        assert torch.equal(tensor, make_v1.expected_weight(layer, int(bits))), name
