"""Tensors in files without a name, and reading ahead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitstrata import scratch
from bitstrata.scratch import Scratch, ahead, kept


def values(seed: int) -> Tensor:
    return torch.randn(7, 5, 4, generator=torch.Generator().manual_seed(seed))


def test_scratch_keeps_tensors_of_any_shape_and_leaves_no_file(tmp_path: Path, seed: int) -> None:
    scratch = Scratch(tmp_path, torch.bfloat16)
    parts = [values(seed), values(seed + 1)[0], torch.zeros(0, 4)]
    for part in parts:
        scratch.append(part)
    assert list(tmp_path.iterdir()) == []
    for number in (2, 0, 1, 0):
        assert torch.equal(scratch[number], parts[number].bfloat16())
    assert len(scratch) == 3
    scratch.close()


def test_reading_ahead_keeps_the_order_and_raises_what_a_read_raises() -> None:
    assert list(ahead([lambda at=at: at for at in range(9)])) == list(range(9))  # type: ignore[misc]
    assert list(ahead([])) == []

    def fail() -> int:
        raise OSError("the disk is gone")

    reading = ahead([lambda: 1, fail, lambda: 3])
    assert next(reading) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(reading)


def test_the_size_alone_decides_where_tensors_are_kept(tmp_path: Path, seed: int) -> None:
    part = values(seed)
    memory, file = kept(scratch.IN_MEMORY, tmp_path), kept(scratch.IN_MEMORY + 1, tmp_path)
    for where in (memory, file):
        where.append(part)
        where.append(part[1:, 2:].transpose(0, 1))
        assert len(where) == 2
        for found, expected in zip(where, (part, part[1:, 2:].transpose(0, 1)), strict=True):
            assert torch.equal(found, expected)
    assert memory[0] is part
    assert isinstance(file, Scratch)
