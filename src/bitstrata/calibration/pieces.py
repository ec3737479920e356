"""A chain of hidden states of which each process has written the windows of its own lanes, a file each.

However many processes wrote it, any number of them may read it: `Pieces` shows the files side by side as one chain.
A single file that has all windows is the same case. Files are named NAME, or NAME.FIRST-END by their lanes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .lanes import LANES, Share, Stretch, windows_of
from .states import States, runs_of


def piece_path(path: Path, lanes: Stretch) -> Path:
    """Where the windows of these lanes lie of the chain `path`."""
    return path if lanes == (0, LANES) else path.with_name(f"{path.name}.{lanes[0]}-{lanes[1]}")


def lanes_on_disk(path: Path) -> list[Stretch]:
    """The lanes of the files that there are of the chain `path`, in order."""
    found = [re.fullmatch(r"\.(\d)-(\d)", each.name[len(path.name) :]) for each in path.parent.glob(f"{path.name}.*")]
    parts = sorted((int(each[1]), int(each[2])) for each in found if each)
    return [(0, LANES)] if path.exists() else parts


class Pieces:
    """Hidden states [windows, S, hidden] of one dtype in several files, in order; read as `States` are."""

    def __init__(self, parts: Sequence[States]) -> None:
        self._parts = parts
        self.shape = torch.Size((sum(map(len, parts)), *parts[0].shape[1:]))
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Some windows, fp32 [b, S, hidden], on the CPU: a range of them, or those with these numbers."""
        return self.as_stored(rows).float()

    def as_stored(self, rows: slice | Tensor) -> Tensor:
        """The same in the dtype of the files."""
        spans = [slice(*rows.indices(len(self))[:2])] if isinstance(rows, slice) else runs_of(rows)
        into = torch.empty(sum(max(0, span.stop - span.start) for span in spans), *self.shape[1:], dtype=self.dtype)
        at = 0
        for span in spans:
            first = 0
            for part in self._parts:
                inside = slice(max(span.start - first, 0), min(span.stop - first, len(part)))
                at += part.read(into[at:], inside) if inside.start < inside.stop else 0
                first += len(part)
        return into

    def close(self) -> None:
        for part in self._parts:
            part.close()

    def remove(self) -> None:
        """Close the files and delete them."""
        for part in self._parts:
            part.remove()


def find_pieces(path: Path) -> Pieces | None:
    """The chain `path`, whoever wrote it; None if a part of it is missing, unfinished or damaged."""
    parts: list[States] = []
    end = 0
    for lanes in lanes_on_disk(path):
        part = States.find(piece_path(path, lanes)) if lanes[0] == end else None
        if part is None:
            break
        parts.append(part)
        end = lanes[1]
    if end != LANES:
        for part in parts:
            part.close()
        return None
    return Pieces(parts)


def open_pieces(path: Path, parts: Sequence[Stretch], shape: Sequence[int], dtype: torch.dtype) -> Pieces:
    """The chain `path` [windows, S, hidden] that others have finished, lanes by lanes; their bytes are not checked."""
    found = []
    for lanes in parts:
        share = Share()
        share.lanes = lanes
        rows = windows_of(shape[0], share)
        found.append(States.open(piece_path(path, lanes), (rows.stop - rows.start, *shape[1:]), dtype))
    return Pieces(found)
