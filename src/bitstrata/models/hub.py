"""A model's folder: a local one, or the snapshot of a hub id with the files that will be read and no others.

What describes a model is small and comes first. It says which weights there are to be read: of a
source those that transformers would load, of a checkpoint the planes and scales of the bits asked
for. Publishers keep other copies beside them, often as large again.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ..checkpoint import QuantizationSpec, is_checkpoint
from ..checkpoint.reader import read_json
from ..checkpoint.schema import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from ..errors import BitstrataError, ModelError, UsageError, first_line
from ..options import FromHub
from ..planes.weights import MAX_BITS
from .source_files import indexed_files

DEFAULT = FromHub()
DESCRIPTIONS = (
    "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*",
    "[0-9]_*/model.safetensors",  # small layers behind an embedding model, by sentence-transformers
    "adapter_model.*",
)  # fmt: skip


def resolve(
    model: str | Path,
    *,
    hub: FromHub = DEFAULT,
    kind: str = "model",
    max_bits: int | None = None,
    weights: bool = True,
) -> Path:
    """A local folder for `model`: itself, or the snapshot of a hub id, downloaded if need be.

    Args:
        hub: which revision of a hub id, and how it is fetched.
        kind: what it is called in errors.
        max_bits: of a checkpoint on the hub, the highest bits that will be read.
        weights: whether weights are needed at all; a tokenizer needs none.

    Raises ModelError if it is neither, UsageError for something that is no name at all.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise UsageError(
            f"a {type(model).__name__} is not the folder or hub id of a {kind}", hint="give its path or id as a string"
        )
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):
        if any("\ud800" <= character <= "\udfff" for character in str(path)):
            raise ModelError(f"the name of {path} is not UTF-8, as the readers of its files need it", hint="rename it")
        return path
    if os.path.islink(path) and not os.path.exists(path):
        raise ModelError(f"{path} is a link to {os.readlink(path)}, which is not there", hint="check the link")
    if os.path.exists(path):
        raise ModelError(f"{path} is a file, not a {kind} folder", hint=f"pass the folder that holds the {kind}")
    text = str(model)
    head, _, tail = text.rpartition(":")
    if head and tail.isdigit():  # not a hub id: those have no colon
        raise ModelError(f"there is no {kind} folder {text!r}", hint=f"bits do not belong here: give {head}")
    if text.count("/") > 1 or text.startswith((".", "/", "~")) or text.endswith("/") or not text:
        raise ModelError(f"there is no {kind} folder {text!r}", hint="check the path")
    try:
        folder = _described(text, hub)
        if weights:
            _fetch_weights(text, folder, max_bits, hub)
    except BitstrataError:
        raise
    except Exception as error:
        raise ModelError(
            f"{text!r} is not a local folder, and the hub did not give it: {first_line(error)}",
            hint="check the path or the hub id; HF_TOKEN is needed for gated models",
        ) from error
    return folder


def _snapshot(repo: str, patterns: Iterable[str], hub: FromHub, *, cached: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repo,
            revision=hub.revision,
            token=hub.token,
            cache_dir=hub.cache_dir,
            allow_patterns=list(patterns),
            local_files_only=cached,
        )
    )


def _described(repo: str, hub: FromHub) -> Path:
    """The snapshot with everything but weights."""
    try:
        return _snapshot(repo, DESCRIPTIONS, hub)
    except Exception:
        # without the hub, a snapshot that lacks some description or other may hold all that is needed
        try:
            folder = _snapshot(repo, [CONFIG_FILE], hub, cached=True)
        except Exception:
            folder = None
        if folder is None or not (folder / CONFIG_FILE).is_file():
            raise
        return folder


def _fetch_weights(repo: str, folder: Path, max_bits: int | None, hub: FromHub) -> None:
    """Download what `folder`, a snapshot, lacks of the weights to be read; all of it from the same commit."""
    if folder.parent.name == "snapshots":
        hub = replace(hub, revision=folder.name)

    def fetch(files: Sequence[str], needed: Sequence[str] | None = None) -> None:
        """`needed`: those that are sure to exist; all by default."""
        try:
            _snapshot(repo, [glob.escape(file) for file in files], hub)
        except Exception:  # without the hub, some versions of its client do not look into their cache for a revision
            if not all((folder / file).is_file() for file in (files if needed is None else needed)):
                raise

    named = None
    if (folder / CONFIG_FILE).is_file() and not is_checkpoint(folder):
        named = read_json(folder / CONFIG_FILE).get("transformers_weights")
    if isinstance(named, str):
        fetch([named])
        if named.endswith(".json") and (folder / named).is_file():
            fetch(sorted(set(indexed_files(folder / named).values())))
        return
    # with a file that is sure to exist: the hub's client warns where nothing matches
    fetch([CONFIG_FILE, SINGLE_FILE], needed=[CONFIG_FILE])
    if (folder / SINGLE_FILE).is_file() or not (folder / INDEX_FILE).is_file():
        return
    shards = indexed_files(folder / INDEX_FILE)
    fetch(sorted({shards[name] for name in _read(folder, shards, max_bits)}))


def _read(folder: Path, shards: Iterable[str], max_bits: int | None) -> set[str]:
    """The tensors, of those in `shards`, that a reader of the model in `folder` looks at."""
    if max_bits is None or not is_checkpoint(folder):
        return set(shards)
    spec = QuantizationSpec.parse(read_json(folder / CONFIG_FILE).get("quantization_config"), str(folder))
    above = {
        name
        for layer in spec.layers
        for name in spec.layer_tensors(layer, MAX_BITS).keys() - spec.layer_tensors(layer, max_bits).keys()
    }
    return set(shards) - above
