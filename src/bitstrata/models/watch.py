"""Notices when a file is no longer the one that was digested.

A job reads its source for hours and says in the result what it read. Size, time of change and identity of each file are
compared around every read; where they differ, the digest decides, so that a file that was only touched is the same.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ..errors import JobError

Stamp = tuple[int, int, int, int]


class FileWatch:
    """The files of one folder, by name, as they were when each was first looked at."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stamps: dict[str, Stamp] = {}
        self._digests: dict[str, str] = {}

    def digest(self, file: str) -> str:
        """The sha256 of `file`, by which it is known from now on. Raises JobError if it changed meanwhile."""
        self.check(file)
        found = self._hash(file)
        self.check(file)
        return self._digests.setdefault(file, found)

    def check(self, file: str) -> None:
        """Raise JobError unless `file` is what it was."""
        stamp = self._stamp(file)
        if self._stamps.setdefault(file, stamp) == stamp:
            return
        if file in self._digests and self._hash(file) == self._digests[file]:
            self._stamps[file] = stamp
            return
        raise _changed(self._folder / file)

    def check_all(self) -> None:
        """`check` every file that was looked at."""
        for file in list(self._stamps):
            self.check(file)

    def _stamp(self, file: str) -> Stamp:
        try:
            found = os.stat(self._folder / file)
        except OSError as error:
            raise _changed(self._folder / file) from error
        return found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino

    def _hash(self, file: str) -> str:
        with open(self._folder / file, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()


def _changed(path: Path) -> JobError:
    return JobError(
        f"{path} changed while it was being read",
        hint="leave the model alone while it is quantized: put back what it was, or start over in another folder",
    )
