"""Files of bytes for what memory should not hold: read and written in parts, and tensors in a file without a name.

Bytes go through plain reads and writes, not through a mapping: what was written stays in the system's cache, as far as
there is room, and never counts as this process's memory. `ahead` reads the next part while the last is worked on.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Protocol, TypeVar

import torch
from torch import Tensor

from .errors import disk_errors

IN_MEMORY = 1 << 24  # numbers that are kept in memory together; more go to a file

T = TypeVar("T")


class Tensors(Protocol):
    """Tensors by number, one after the other: a list, or a file of them."""

    def append(self, tensor: Tensor, /) -> None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Tensor: ...

    def __iter__(self) -> Iterator[Tensor]: ...


def ahead(reads: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What each of `reads` returns, in order; the next one runs in a thread meanwhile."""
    waiting: Future[T] | None = None
    with ThreadPoolExecutor(1) as reader:
        for read in reads:
            coming = reader.submit(read)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's own bytes, or those of a copy on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class ByteFile:
    """A file of bytes that one thread appends to and any may read."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.path = path
        self._file, self._lock = file, threading.Lock()

    def append(self, data: memoryview) -> None:
        with disk_errors(self.path), self._lock:
            self._file.seek(0, os.SEEK_END)
            while data:
                data = data[self._file.write(data) :]

    def read(self, into: Tensor, start: int) -> Tensor:
        """Fill `into` from byte `start` on. Raises OSError if the file is too short."""
        view = bytes_of(into)
        with self._lock:
            self._file.seek(start)
            while view:
                count = self._file.readinto(view)  # type: ignore[attr-defined]
                if not count:
                    raise OSError(f"{self.path} is shorter than it was")
                view = view[count:]
        return into

    def close(self) -> None:
        self._file.close()


class Scratch:
    """Tensors of any shape in a file that has no name, by number; kept in one dtype, on the CPU.

    folder: where the file lies; None for the system's own place for such files.
    """

    def __init__(self, folder: Path | None, dtype: torch.dtype) -> None:
        where = Path(tempfile.gettempdir()) if folder is None else folder
        with disk_errors(where):
            file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  (kept open)
        self._file, self._dtype = ByteFile(file, where), dtype
        self._parts: list[tuple[int, torch.Size]] = []
        self._end = 0

    def append(self, tensor: Tensor) -> None:
        self._file.append(bytes_of(tensor.to(self._dtype)))
        self._parts.append((self._end, tensor.shape))
        self._end += tensor.numel() * self._dtype.itemsize

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Tensor]:
        """All in order, the next one read while the last is worked on."""
        return ahead(lambda number=number: self[number] for number in range(len(self)))  # type: ignore[misc]

    def __getitem__(self, number: int) -> Tensor:
        start, shape = self._parts[number]
        return self._file.read(torch.empty(shape, dtype=self._dtype), start)

    def close(self) -> None:
        self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()


def kept(numbers: int, folder: Path | None) -> Tensors:
    """Where fp32 tensors of so many numbers in all are kept: in memory as they are, or in a file.

    The size alone decides, so a result does not depend on the machine.
    """
    found: Tensors = [] if numbers <= IN_MEMORY else Scratch(folder, torch.float32)
    return found
