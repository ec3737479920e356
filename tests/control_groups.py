"""Pretended control groups: a container's memory limit, as the files that the system shows it in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bitstrata import memory


def group(folder: Path, files: tuple[str, str, str], *, limit: object, used: object, cache: int = 0) -> None:
    """The files of one memory group, `memory._V1` or `_V2`, in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    limit_file, usage_file, cache_key = files
    (folder / limit_file).write_text(f"{limit}\n")
    (folder / usage_file).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{cache_key} {cache}\nother 7\n")


@pytest.fixture
def cgroups(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """cgroups(lines of /proc/self/cgroup) -> the folder that the groups are in."""
    folder = tmp_path_factory.mktemp("groups")
    root, process = folder / "cgroup", folder / "self"
    root.mkdir()

    def write(*lines: str) -> Path:
        process.write_text("\n".join(lines) + "\n")
        return root

    monkeypatch.setattr(memory, "_CGROUPS", root)
    monkeypatch.setattr(memory, "_PROCESS", process)
    return write
