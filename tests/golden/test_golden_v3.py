"""Files of format version 3, written once, read forever."""

from __future__ import annotations

from pathlib import Path

import make_v3
import pytest
import torch
from safetensors.torch import load_file

from bitstrata.checkpoint import CheckpointReader, validate
from bitstrata.kernels.cpu import BlockedWeight, missing
from bitstrata.planes import decode

HERE = Path(__file__).parent
FOLDER, EXPECTED = HERE / "v3", HERE / "v3_expected.safetensors"


def test_it_is_valid():
    assert validate(FOLDER) == []


@pytest.mark.parametrize("max_bits", [1, 4, 8])
def test_it_decodes_to_exactly_the_expected_weights(max_bits):
    expected = load_file(EXPECTED)
    reader = CheckpointReader(FOLDER, max_bits=max_bits, verify=True)
    assert reader.spec.layer_bits(make_v3.LAYER, max_bits) == tuple(b for b in make_v3.BITS if b <= max_bits)
    for bits in reader.spec.layer_bits(make_v3.LAYER, max_bits):
        weight = reader.layer(make_v3.LAYER)
        assert torch.equal(decode(weight, bits, torch.float64), expected[f"{make_v3.LAYER}@{bits}"])
        if not missing:
            assert torch.equal(decode(BlockedWeight.pack(weight).unpack(), bits), decode(weight, bits))


def test_the_same_content_is_written_byte_for_byte_today(tmp_path):
    make_v3.write(tmp_path / "v3")
    written = {path.name: path.read_bytes() for path in (tmp_path / "v3").iterdir()}
    assert written.keys() == {path.name for path in FOLDER.iterdir()}
    for name, data in written.items():
        assert data == (FOLDER / name).read_bytes(), name


def test_the_expected_weights_follow_from_the_definition():
    for name, tensor in load_file(EXPECTED).items():
        assert torch.equal(tensor, make_v3.expected_weight(int(name.rpartition("@")[2]))), name
