"""Whose file it is that is to be imported."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint import is_checkpoint
from ..errors import ModelError
from .folder_import import open_folder
from .gguf_import import open_gguf
from .sources import Source


def open_source(path: Path) -> Source:
    """The model at `path`. Raises ModelError if it is of no program that is known here."""
    if path.is_file() and path.suffix == ".gguf":
        return open_gguf(path)
    if not path.is_dir():
        raise ModelError(f"{path} is neither a .gguf file nor a folder of a model", hint="check the path")
    if is_checkpoint(path):
        raise ModelError(f"{path} is a checkpoint of bitstrata already", hint="nothing is to be imported")
    return open_folder(path)
