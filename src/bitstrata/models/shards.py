"""Which files of a source model hold its weights, chosen as transformers chooses them.

In this order: the file that the config names (`transformers_weights`), `model.safetensors`, or the
shards of `model.safetensors.index.json`, which may lie in sub-folders. Every tensor of a shard
counts, whether the index lists it or not; of one that is stored twice the last shard's is taken.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from ..checkpoint.reader import regular_file
from ..checkpoint.schema import INDEX_FILE, SINGLE_FILE
from ..errors import ModelError

ADAPTER = "adapter_config.json"
AGAIN = "download the model again"


def entry_file(folder: Path, named: str | None = None) -> str:
    """The file in `folder` that weights are read from: a safetensors file, or the index of several.

    Args:
        named: what the config calls it, if it does.

    Raises ModelError if there is none; it says what there is instead.
    """
    if named is not None and not _is_inside(named):
        raise ModelError(f"{folder / 'config.json'}: transformers_weights {named!r} is not a file name", hint=AGAIN)
    for name in (SINGLE_FILE, INDEX_FILE) if named is None else (named,):
        if regular_file(folder / name, ModelError).is_file():
            return name
    found = sorted(path.name for kind in ("*.safetensors", "*.bin", "*.gguf") for path in folder.glob(kind))
    there = f"; there is {', '.join(found[:3])}" if found else ""
    if any(name.endswith(".bin") for name in found):
        hint = "convert the .bin files first: load with transformers and save_pretrained"
    elif found:
        hint = f"transformers would not load these either; a whole model in one file is called {SINGLE_FILE}"
    else:
        hint = "is the download complete?"
    wanted = f"{SINGLE_FILE} and no {INDEX_FILE}" if named is None else f"{named}, which its config names"
    raise ModelError(f"{folder} has no {wanted}{there}", hint=hint)


def promised(index: Path) -> dict[str, str]:
    """Tensor name -> file name relative to the folder, as an index has it. Raises ModelError if it is malformed."""
    try:
        files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise ModelError(f"{index} is not a valid index: {error}", hint=AGAIN) from error
    for file in files.values():
        if not _is_inside(file):
            raise ModelError(f"{index}: {file!r} is not a file name", hint=AGAIN)
    return files


def _is_inside(file: object) -> bool:
    """Whether `file` names something in the index's own folder or below it."""
    if not isinstance(file, str) or not file.isprintable() or "\\" in file:
        return False
    path = PurePosixPath(file)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def check_adapter(folder: Path) -> None:
    """Raise ModelError if `folder` holds an adapter: transformers would load it on top, or the base it names."""
    if (folder / ADAPTER).is_file():
        alone = not (folder / "config.json").is_file()
        raise ModelError(
            f"{folder} is an adapter, not a model" if alone else f"{folder} holds an adapter ({ADAPTER}) on its model",
            hint="merge it first: with peft, PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(FOLDER)"
            + ("" if alone else f"; or move {ADAPTER} away to quantize the model without it"),
        )
