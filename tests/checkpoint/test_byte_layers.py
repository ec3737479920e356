"""Checkpoints with coefficients in bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_same_weight, random_weight, save_checkpoint
from safetensors.torch import load_file, save_file

from bitstrata.checkpoint import CheckpointReader, validate
from bitstrata.errors import CheckpointError

SHARD = "model-bits-3.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "out", {"a": random_weight(5, 70, kind="affine8", bits=(2, 3, 6))}, bits=(2, 3, 6))
    return tmp_path / "out"


def damage(folder: Path, unit: float) -> None:
    """Change one unit in place, and forget the digests."""
    tensors = load_file(folder / SHARD)
    tensors["a.unit_3"][2] = unit
    save_file(tensors, folder / SHARD, {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["metadata"]["sha256"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_they_come_back_as_they_were_written(folder):
    assert validate(folder) == []
    original = random_weight(5, 70, kind="affine8", bits=(2, 3, 6))
    assert_same_weight(CheckpointReader(folder).layer("a"), original)
    assert_same_weight(CheckpointReader(folder, max_bits=3).layer("a"), original.prefix(3))
    stored = load_file(folder / SHARD)
    assert {name: tensor.dtype for name, tensor in stored.items()} == {
        "a.scale_3": torch.int8, "a.offset_3": torch.int8, "a.unit_3": torch.float16,
    }  # fmt: skip


@pytest.mark.parametrize("unit", [-1.0, 1.03125, 2**-15, float("inf"), float("nan")])
def test_a_unit_that_cannot_be_one_is_named(folder, unit):
    damage(folder, unit)
    expected = r"a\.unit_3 in model-bits-3\.safetensors holds (NaN|a unit with more than four)"
    with pytest.raises(CheckpointError, match=expected):
        CheckpointReader(folder).layer("a")
    assert len(validate(folder)) == 1
    CheckpointReader(folder, max_bits=2).layer("a")


def test_bytes_need_their_format_version(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["format_version"] == 3
    config["quantization_config"]["format_version"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="a: scales 'affine8' needs format_version 3"):
        CheckpointReader(folder)
