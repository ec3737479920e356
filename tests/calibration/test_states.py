"""Hidden states on disk: what is written is read, and what is not whole is not taken for a chain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitstrata.calibration.states import FOOTER, States

SHAPE = (5, 3, 7)


def values(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def written(path: Path, tensor: Tensor, dtype: torch.dtype = torch.float32) -> States:
    states = States.create(path, tensor.shape, dtype)
    for part in tensor.split(2):
        states.append(part)
    return states.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_windows_are_read_as_they_were_written(dtype: torch.dtype, tmp_path: Path, seed: int) -> None:
    tensor = values(seed)
    written(tmp_path / "chain", tensor, dtype).close()
    states = States.find(tmp_path / "chain")
    assert states is not None
    assert (len(states), states.shape, states.dtype) == (5, torch.Size(SHAPE), dtype)
    expected = tensor.to(dtype)
    for rows in (slice(0, 5), slice(1, 2), slice(3, 9), slice(2, 2)):
        assert torch.equal(states.as_stored(rows), expected[rows])
        assert torch.equal(states[rows], expected[rows].float())
    picked = torch.tensor([4, 0, 4, 2])
    assert torch.equal(states[picked], expected[picked].float())
    states.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_is_appended_may_be_any_view(tmp_path: Path, seed: int) -> None:
    tensor = values(seed)
    states = States.create(tmp_path / "chain", SHAPE, torch.float32)
    states.append(tensor.transpose(1, 2).contiguous().transpose(1, 2)[:2])
    states.append(tensor[2:])
    assert torch.equal(states.finish()[:5], tensor)


@pytest.mark.parametrize("place", ["first byte", "middle", "footer"])
def test_a_damaged_chain_is_not_found(place: str, tmp_path: Path, seed: int) -> None:
    path = tmp_path / "chain"
    written(path, values(seed)).close()
    data = bytearray(path.read_bytes())
    at = {"first byte": 0, "middle": len(data) // 2, "footer": len(data) - FOOTER + 12}[place]
    data[at] ^= 1
    path.write_bytes(data)
    assert States.find(path) is None


def test_an_unfinished_chain_is_not_found(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "chain"
    assert States.find(path) is None
    written(path, values(seed)).close()
    data = path.read_bytes()
    for size in (0, 1, FOOTER - 1, FOOTER, len(data) - FOOTER, len(data) - 1):
        path.write_bytes(data[:size])
        assert States.find(path) is None, f"{size} of {len(data)} bytes"
    path.write_bytes(data + b" ")
    assert States.find(path) is None
    path.write_bytes(data)
    assert States.find(path) is not None
