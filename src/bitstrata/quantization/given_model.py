"""A model object given to `quantize`: written to a folder for as long as the job takes.

A job reads a block at a time from files, and resumes by what is in them, so it works on files alone.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..errors import InputError, ResourceError, UsageError, first_line
from ..models import load_tokenizer, resolve
from ..models.merging import merged
from ..options import QuantizeOptions
from .settings import Settings


@contextmanager
def on_disk(options: QuantizeOptions) -> Iterator[QuantizeOptions]:
    """`options` with a folder where a model was given, or an adapter to merge, which is gone afterwards.

    It lies in the system's folder for temporary files (TMPDIR). The tokenizer is that of the folder or hub id that the
    model was loaded from, if it was.

    Raises PreflightError for arguments of the wrong kind, UsageError for a model that is quantized already,
    ResourceError where there is no room.
    """
    model = options.model
    if options.merge_adapter:
        if isinstance(model, PreTrainedModel):
            raise UsageError("merge_adapter is for an adapter in a folder or on the hub", hint="PEFT: merge_and_unload")
        _check_others(options)
        name = Path(model).name
        model, home = merged(model, options.hub)
        origin = str(home)
    elif isinstance(model, PreTrainedModel):
        if getattr(model, "is_quantized", False):
            raise UsageError(
                "the model is quantized already", hint="load the original, or call model.dequantize() first"
            )
        _check_others(options)
        origin = str(model.name_or_path)
        name = Path(origin).name or type(model).__name__
    else:
        yield options
        return
    with tempfile.TemporaryDirectory(prefix="bitstrata-") as parent:
        folder = Path(parent) / name
        try:
            model.save_pretrained(folder)
        except (OSError, SafetensorError) as error:
            raise ResourceError(
                f"the model cannot be written to {folder}: {first_line(error)}",
                hint="set TMPDIR to a folder on a larger disk, or save it yourself and give the folder",
            ) from error
        if origin:
            _take_tokenizer(origin, folder)
        yield replace(options, model=folder, merge_adapter=False)


def _check_others(options: QuantizeOptions) -> None:
    """Raise PreflightError for what is wrong with the other arguments, before anything is written."""
    Settings.parse(replace(options, model=Path()))


def _take_tokenizer(origin: str, folder: Path) -> None:
    try:
        tokenizer = load_tokenizer(resolve(origin, weights=False))
    except InputError:  # the model was never there, or is no longer: preflight says so where a text needs one
        return
    tokenizer.save_pretrained(os.fspath(folder))
