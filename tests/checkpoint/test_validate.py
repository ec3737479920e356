"""validate says everything that is wrong, in sentences that name file and tensor."""

from __future__ import annotations

import pytest
import torch
from damage import INDEX, edit_index, edit_tensor, forget_digests, replace_file, with_first
from helpers import random_weight, save_checkpoint

from bitstrata.checkpoint import validate


@pytest.fixture
def folder(tmp_path):
    """A checkpoint whose digests do not hide what is changed later."""
    layers = {"a": random_weight(5, 70, seed=1), "b": random_weight(3, 64, kind="codebook", seed=2)}
    save_checkpoint(tmp_path, layers, common={"norm.weight": torch.arange(4.0)})
    forget_digests(tmp_path)
    return tmp_path


def set_bit(row, word, bit):
    def change(plane):
        plane[row, word] |= torch.tensor(-(2**31) if bit == 31 else 1 << bit, dtype=torch.int32)
        return plane

    return change


def test_nothing_to_say_about_a_good_one(folder):
    assert validate(folder) == []
    assert validate(str(folder)) == []


@pytest.mark.parametrize("bit", [6, 17, 31], ids=["first-padding-bit", "middle", "sign-bit"])
def test_set_padding_bits_are_found(folder, bit):
    edit_tensor("a.plane_2", set_bit(4, 2, bit))(folder)
    assert validate(folder) == ["a.plane_2: padding bits past column 69 are set"]


def test_the_last_real_column_is_not_padding(folder):
    edit_tensor("a.plane_2", set_bit(4, 2, 5))(folder)
    assert validate(folder) == []


def test_a_missing_guard_is_found(folder):
    edit_index(lambda index: index["weight_map"].pop("b.weight"))(folder)
    assert validate(folder) == ["layer b has no guard tensor"]


def test_all_problems_are_listed(folder):
    edit_index(lambda index: index["weight_map"].pop("b.weight"))(folder)
    edit_tensor("a.offset_3", with_first(torch.nan))(folder)
    edit_tensor("b.table_2", with_first(torch.inf))(folder)
    edit_tensor("norm.weight", lambda tensor: None)(folder)
    assert validate(folder) == [
        "layer b has no guard tensor",
        "a.offset_3 in model-bits-3.safetensors holds NaN or infinity",
        "b.table_2 in model-bits-2.safetensors holds NaN or infinity",
        f"tensor norm.weight is missing from {folder / 'model-common.safetensors'}",
    ]


@pytest.mark.parametrize("file", ["model-plane-1.safetensors", "model-bits-4.safetensors", "model-common.safetensors"])
def test_a_digest_that_differs_is_one_problem(tmp_path, file):
    save_checkpoint(tmp_path, {"a": random_weight(5, 70)}, common={"norm.weight": torch.ones(4), "x": torch.ones(4)})
    data = bytearray((tmp_path / file).read_bytes())
    data[-1] ^= 1
    replace_file(tmp_path / file, bytes(data))
    assert validate(tmp_path) == [f"{tmp_path / file} is damaged: its sha256 is not the one in {INDEX}"]
