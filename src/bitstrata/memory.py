"""Memory: how an error says that there is none, how to take it so that it goes back, how much may still be taken."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import ResourceError

HUGE_PAGE = 1 << 21
OWN_MAPPING = 1 << 16  # from here on a tensor has a mapping of its own: whole pages then cost at most a few percent

# how torch, its allocators, its libraries and the system say it where the type of the error does not
_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|cannot allocate memory|can't allocate memory|std::bad_alloc|_ALLOC_FAILED",
    re.IGNORECASE,
)

_CGROUPS = Path("/sys/fs/cgroup")
_PROCESS = Path("/proc/self/cgroup")
# files of a memory cgroup: limit, usage, and in memory.stat the part of the usage that is a cache of files
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says, in whatever type and words, that this machine or its GPU has no more memory to give."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, (RuntimeError, SafetensorError)) and _NO_MEMORY.search(str(error)) is not None


@contextlib.contextmanager
def memory_errors(what: str, *, hint: str) -> Iterator[None]:
    """Turn every way to say that memory ran out while doing `what` into a ResourceError."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(f"memory ran out {what}", hint=hint) from error


def allocate(size: int, start: int = 0) -> Tensor:
    """An uninitialised uint8 tensor on the CPU of `size` bytes, `start` bytes (a multiple of 64) into a page.

    A large one is a mapping of its own: dropping its last user gives the memory back to the system at once, which the
    C library does only for some sizes and orders. Large pages are asked for where they fit.
    """
    if size < OWN_MAPPING:
        return torch.empty(size, dtype=torch.uint8, device="cpu")  # whatever torch's default device is
    huge = (start + size) // HUGE_PAGE * HUGE_PAGE
    room = _anonymous(start + size + (HUGE_PAGE if huge else 0))
    whole = torch.frombuffer(room, dtype=torch.uint8)  # keeps the mapping as long as a view of it lives
    skip = -whole.data_ptr() % HUGE_PAGE if huge else 0
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            room.madvise(mmap.MADV_HUGEPAGE, skip, huge)
    return whole[skip + start : skip + start + size]


def _anonymous(size: int) -> mmap.mmap:
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)


def return_free_memory() -> None:
    """Ask the C library to give freed pages back; without it a long job's heap keeps its high-water mark."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has it, and only glibc needs it
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory() -> int:
    """The process's highest resident memory so far, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that this process may still take on `device`, the limits of its control groups respected."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return max(0, min([int(psutil.virtual_memory().available), *_cgroup_headroom()]))


def _cgroup_headroom() -> Iterator[int]:
    """What is left below the limit of each control group, of either version, that this process is in."""
    try:
        lines = _PROCESS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, _, line = line.partition(":")
        controllers, _, path = line.partition(":")
        if controllers == "":
            root, names = _CGROUPS, _V2
        elif "memory" in controllers.split(","):
            root, names = _CGROUPS / "memory", _V1
        else:
            continue
        # inside a container the path may be that of the host, and the group's files lie at the root
        group = root / path.strip("/")
        for folder in [group, *(parent for parent in group.parents if parent.is_relative_to(root))]:
            headroom = _headroom(folder, *names)
            if headroom is not None:
                yield headroom


def _headroom(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    """None if the group has no limit, or is not there."""
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        if most == "max":
            return None
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(most) - used + int(stat.get(cache, 0))
    except (OSError, ValueError):
        return None
