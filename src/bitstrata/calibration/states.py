"""Hidden states on disk, so that memory does not grow with the number of tokens.

`States` is a chain: hidden states [windows, S, hidden] in one file, written in order and then read as often as needed.
The file ends in a footer with shape, dtype and a checksum of all that stands before it, written last and synced, so a
file without the right one was never finished, or is damaged.
"""

from __future__ import annotations

import itertools
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from ..errors import disk_errors
from ..scratch import ByteFile, bytes_of

FOOTER = 256  # bytes
READ_BYTES = 1 << 22


def runs_of(numbers: Tensor) -> list[slice]:
    """These numbers int64 [n] as ranges, in their order."""
    ends = (numbers.diff() != 1).nonzero()[:, 0].add(1).tolist()
    found = numbers.tolist()
    return [slice(found[at], found[end - 1] + 1) for at, end in itertools.pairwise([0, *ends, len(found)]) if end]


class States:
    """Hidden states [windows, S, hidden] of one dtype in a file; read, they are fp32 (`as_stored`: as they are).

    Made by `create` and filled with `append`, in order, until `finish`; or found by `find`.
    """

    def __init__(self, file: ByteFile, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._file, self.shape, self.dtype = file, torch.Size(shape), dtype
        self.path = file.path
        self._checksum = 0

    @classmethod
    def create(cls, path: Path, shape: Sequence[int], dtype: torch.dtype) -> States:
        """An empty chain that will have this shape; what `path` held is gone."""
        with disk_errors(path):
            path.unlink(missing_ok=True)
            return cls(ByteFile(open(path, "w+b", buffering=0), path), shape, dtype)

    @classmethod
    def find(cls, path: Path) -> States | None:
        """The chain in `path`; None if there is none, or one that is unfinished or damaged."""
        try:
            file = open(path, "rb", buffering=0)  # noqa: SIM115  (kept open)
        except OSError:
            return None
        found = cls._checked(file, path)
        if found is None:
            file.close()
        return found

    @classmethod
    def open(cls, path: Path, shape: Sequence[int], dtype: torch.dtype) -> States:
        """The chain in `path`, of this shape, which another process has finished; its bytes are not checked."""
        return cls(ByteFile(open(path, "rb", buffering=0), path), shape, dtype)

    @classmethod
    def _checked(cls, file: IO[bytes], path: Path) -> States | None:
        try:
            left = os.fstat(file.fileno()).st_size - FOOTER
            file.seek(max(0, left))
            said = json.loads(file.read(FOOTER))
            shape, dtype = torch.Size(said["shape"]), getattr(torch, said["dtype"])
            if left != shape.numel() * dtype.itemsize:
                return None
            checksum = 0
            file.seek(0)
            while left > 0 and (chunk := file.read(min(left, READ_BYTES))):
                checksum = zlib.crc32(chunk, checksum)
                left -= len(chunk)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return cls(ByteFile(file, path), shape, dtype) if checksum == said["crc32"] else None

    def append(self, part: Tensor) -> None:
        """The next windows: [b, S, hidden]."""
        data = bytes_of(part.to(self.dtype))
        self._checksum = zlib.crc32(data, self._checksum)
        self._file.append(data)

    def finish(self) -> States:
        """All windows are there: make the file durable."""
        said = {
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "crc32": self._checksum,
        }
        self._file.append(memoryview(json.dumps(said).ljust(FOOTER).encode()))
        with disk_errors(self.path):
            os.fsync(self._file._file.fileno())
        return self

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Some windows, fp32 [b, S, hidden], on the CPU: a range of them, or those with these numbers."""
        return self.as_stored(rows).float()

    def as_stored(self, rows: slice | Tensor) -> Tensor:
        """The same in the dtype of the file."""
        spans = [slice(*rows.indices(len(self))[:2])] if isinstance(rows, slice) else runs_of(rows)
        into = torch.empty(sum(max(0, span.stop - span.start) for span in spans), *self.shape[1:], dtype=self.dtype)
        at = 0
        for span in spans:
            at += self.read(into[at:], span)
        return into

    def read(self, into: Tensor, rows: slice) -> int:
        """Fill the beginning of `into` with a range of windows; returns how many they are."""
        count: int = max(0, rows.stop - rows.start)
        self._file.read(into[:count], rows.start * self.shape[1:].numel() * self.dtype.itemsize)
        return count

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """Close the file and delete it."""
        self.close()
        self.path.unlink(missing_ok=True)
