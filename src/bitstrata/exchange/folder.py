"""A result that appears whole or not at all: room on the disk first, a folder or file beside it, and its name last."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checkpoint.writer import TEMPORARY
from ..errors import ResourceError, UsageError, disk_errors

MEGABYTE = 1_000_000


def check_room(output: Path, size: int) -> None:
    """Raise UsageError if `output` is there already, ResourceError if its disk has not `size` bytes free."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"{output} is there already", hint="choose another name, or remove it first")
    existing = next(parent for parent in (output.absolute(), *output.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise ResourceError(
            f"{output} needs about {size / MEGABYTE:.0f} MB of disk, {free / MEGABYTE:.0f} MB are free",
            hint="free some space, or choose another disk",
        )


@contextmanager
def whole(output: Path) -> Iterator[Path]:
    """The name of a file or folder to write; what is there at the end is renamed to `output`, on an error removed."""
    output = output.absolute()
    temporary = output.with_name(f"{output.name}{TEMPORARY}")
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        try:
            yield temporary
            if temporary.is_dir() and output.is_dir():
                output.rmdir()  # an empty one
            os.replace(temporary, output)
        finally:
            _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
