"""Whose file it is that is to be imported."""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelError
from .gguf_import import open_gguf
from .sources import Source


def open_source(path: Path) -> Source:
    """The model at `path`. Raises ModelError if it is of no program that is known here."""
    if path.is_file() and path.suffix == ".gguf":
        return open_gguf(path)
    raise ModelError(f"{path} is neither a .gguf file nor a folder of a model", hint="check the path")
