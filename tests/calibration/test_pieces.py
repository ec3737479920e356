"""A chain in several files reads as one, and lanes of several processes add up to the same sums."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitstrata.calibration.lanes import LANES, LaneSum, Share, Stretch, batches, is_pair, stretches_of, windows_of
from bitstrata.calibration.pieces import Pieces, find_pieces, lanes_on_disk, open_pieces, piece_path
from bitstrata.calibration.states import States
from bitstrata.quantization.team import lanes_of

SHAPE = (3, 4)  # of a window


def share_of(rank: int, size: int) -> Share:
    share = Share()
    share.lanes = lanes_of(rank, size)
    return share


def write(path: Path, windows: Tensor, size: int, but: int | None = None) -> list[Stretch]:
    """As so many processes do; process `but` does not finish."""
    for rank in range(size):
        share = share_of(rank, size)
        own = windows[windows_of(len(windows), share)]
        states = States.create(piece_path(path, share.lanes), own.shape, windows.dtype)
        for rows in own.split(2):
            states.append(rows)
        if rank == but:
            states.close()
        else:
            states.finish().close()
    return [lanes_of(rank, size) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("count", [1, 7, 16])
def test_files_of_any_number_of_processes_read_as_one_chain(size: int, count: int, tmp_path: Path, seed: int) -> None:
    windows = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed)).bfloat16()
    parts = write(tmp_path / "chain", windows, size)
    assert lanes_on_disk(tmp_path / "chain") == parts
    found = find_pieces(tmp_path / "chain")
    assert found is not None
    for pieces in (found, open_pieces(tmp_path / "chain", parts, windows.shape, windows.dtype)):
        assert pieces.shape == windows.shape
        assert torch.equal(pieces.as_stored(slice(0, count)), windows)
        for start, stop in itertools.product(range(count + 1), repeat=2):
            assert torch.equal(pieces[start:stop], windows[start:stop].float())
        some = torch.randint(count, (5,), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(pieces[some], windows[some].float())
        pieces.close()
    found.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_chain_with_a_part_missing_damaged_or_unfinished_is_none(tmp_path: Path) -> None:
    windows = torch.zeros(16, *SHAPE)
    assert find_pieces(tmp_path / "none") is None
    write(tmp_path / "unfinished", windows, 4, but=2)
    assert find_pieces(tmp_path / "unfinished") is None
    for lost in range(4):
        path = tmp_path / f"lost-{lost}"
        parts = write(path, windows, 4)
        piece_path(path, parts[lost]).unlink()
        assert find_pieces(path) is None
    parts = write(tmp_path / "damaged", windows, 2)
    piece = piece_path(tmp_path / "damaged", parts[1])
    content = bytearray(piece.read_bytes())
    content[5] ^= 1
    piece.write_bytes(content)
    assert find_pieces(tmp_path / "damaged") is None


def test_a_single_file_is_a_piece_too(tmp_path: Path) -> None:
    windows = torch.arange(24.0).reshape(2, *SHAPE)
    write(tmp_path / "chain", windows, 1)
    found = find_pieces(tmp_path / "chain")
    assert isinstance(found, Pieces)
    assert [path.name for path in tmp_path.iterdir()] == ["chain"]


@pytest.mark.parametrize("size", range(1, LANES + 1))
def test_processes_share_all_windows_and_the_tree_joins_what_they_sum(size: int, seed: int) -> None:
    parts = torch.randn(LANES, 3, 5, generator=torch.Generator().manual_seed(seed)) * 1e3
    a, b, c, d, e, f, g, h = parts
    expected = ((a + b) + (c + d)) + ((e + f) + (g + h))
    rows = [row for rank in range(size) for part in batches(21, 2, share_of(rank, size)) for row in range(21)[part]]
    assert rows == list(range(21))
    held: list[tuple[Stretch, Tensor]] = []
    for rank in range(size):

        class Told(Share):
            lanes = lanes_of(rank, size)

            def total(self, own):
                assert [stretch for stretch, _ in own] == stretches_of(self.lanes)
                held.extend(own)
                return torch.zeros(())

        total = LaneSum((3, 5), torch.device("cpu"), Told())
        for lane in range(*lanes_of(rank, size)):
            total.current.add_(parts[lane])
            total.end_lane()
        total.result()
    done: list[tuple[Stretch, Tensor]] = []
    for one in held:
        done.append(one)
        while len(done) > 1 and is_pair(done[-2][0], done[-1][0]):
            ((start, _), left), ((_, end), right) = done[-2:]
            done[-2:] = [((start, end), left + right)]
    ((stretch, whole),) = done
    assert stretch == (0, LANES)
    assert torch.equal(whole, expected)
