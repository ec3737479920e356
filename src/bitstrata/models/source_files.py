"""The files of a source model: which hold its weights, what their tensors are called in the model, whether they change.

The files are chosen as transformers chooses them, in this order: the one that the config names
(`transformers_weights`), `model.safetensors`, or the shards of `model.safetensors.index.json`, which may lie in
sub-folders. Every tensor of a shard counts, whether the index lists it or not; of one that is stored twice the last
shard's is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath

from transformers import PreTrainedModel

from ..checkpoint.reader import regular_file
from ..checkpoint.schema import INDEX_FILE, SINGLE_FILE
from ..errors import JobError, ModelError
from .compat import Conversion, conversions_of, expert_changes, name_changes
from .experts import Layout, Part, expert_index, linear_name, parts_of
from .packed import Converted, Held, converted

ADAPTER = "adapter_config.json"
AGAIN = "download the model again"
# what wrappers put into the names of the model they hold -> how to save that model itself
WRAPPERS = {
    "lora_A": "merge the adapter (peft: merge_and_unload), then save_pretrained",
    "base_layer": "merge the adapter (peft: merge_and_unload), then save_pretrained",
    "base_model": "save the model inside the peft wrapper: merge_and_unload, then save_pretrained",
    "_orig_mod": "save the model before torch.compile, or model._orig_mod.save_pretrained",
    "module": "save the model inside the parallel wrapper: model.module.save_pretrained",
    "_fsdp_wrapped_module": "gather a full state dict before saving, without the FSDP wrapper's names",
    "_checkpoint_wrapped_module": "save the model without the activation checkpointing wrapper",
}


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


def indexed_files(index: Path) -> dict[str, str]:
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
            hint="--merge-adapter merges it first (in Python merge_adapter=True)"
            + ("" if alone else f"; or move {ADAPTER} away to quantize the model without it"),
        )


def bind(
    model: PreTrainedModel, stored_names: Iterable[str], experts: Mapping[str, Layout], spec: Callable[[str], Held]
) -> tuple[dict[str, str], dict[str, Converted], dict[str, Part]]:
    """What the state dict of `model` is made of, three ways:

        names       state-dict name -> stored name
        made        name of a tensor that transformers makes of stored ones -> how; it is its own stored name
        parts       state-dict name -> its part in a stored tensor of all experts

    Names may differ by the base model's prefix and by the renamings that transformers applies to
    older files. Of a pair that the config ties, one name may be stored for both. Raises ModelError
    for tensors that transformers would merge or split in a way that is not known here.

    Args:
        experts: names of the modules of `model` that `split_experts` has made, and their layouts.
        spec: dtype and shape of a stored tensor.
    """
    expected = set(model.state_dict())
    merged = {f"{name}.{key}": (name, layout, key) for name, layout in experts.items() for key in layout.merged}
    prefix = f"{model.base_model_prefix}."
    changed, conversion_of, of_expert = name_changes(model), conversions_of(model), expert_changes(model)
    names: dict[str, str] = {}
    parts: dict[str, Part] = {}
    taken: dict[str, tuple[dict[int, str], Conversion]] = {}

    def known(renamed: str, stored: str | None = None) -> str | None:
        # a name that a pattern for older files happens to match may be the model's own
        candidates = (renamed, prefix + renamed, renamed.removeprefix(prefix), stored)
        return next((name for name in candidates if name in expected or name in merged), None)

    def put(name: str | None, stored: str, shape: Callable[[], tuple[int, ...]]) -> None:
        if name in merged:
            module, layout, key = merged[name]
            parts.update(parts_of(module, layout, key, stored, shape()))
        elif name is not None:
            names[name] = stored

    for stored in sorted(stored_names):
        renamed, is_changed = changed(stored)
        if is_changed and (expert := of_expert(renamed)) is not None:
            renamed = _of_expert(stored, renamed, expert)
        elif is_changed and (change := conversion_of(renamed)) is not None:
            first, index, conversion = change
            if (name := known(first)) is not None:
                others, _ = taken.setdefault(name, ({}, conversion))
                if index in others:
                    raise _unknown_change(stored)
                others[index] = stored
                continue
        put(known(renamed, stored), stored, lambda stored=stored: spec(stored)[1])  # type: ignore[misc]
    made: dict[str, Converted] = {}
    for first, (found, conversion) in taken.items():
        if len(found) == conversion.count:
            of = [found[index] for index in sorted(found)]
            made |= converted(first, of, [spec(part) for part in of], conversion)
    for name, tensor in made.items():
        put(name if name in expected or name in merged else None, name, lambda tensor=tensor: tensor.shape)  # type: ignore[misc]
    return names, made, parts


def _of_expert(stored: str, renamed: str, found: tuple[str, int, int]) -> str:
    """What a tensor that goes into a parameter of all experts is called. Raises ModelError for any other."""
    expert = expert_index(renamed)
    if not found[2]:
        return found[0]
    if expert is not None:
        return linear_name(found[0], expert, *found[1:])
    raise _unknown_change(stored)


def _unknown_change(stored: str) -> ModelError:
    return ModelError(
        f"{stored} is stored in pieces that transformers merges or splits when it loads them",
        hint="such models cannot be quantized yet",
    )


def share(names: dict[str, str], ties: Iterable[tuple[str, str]]) -> dict[str, str]:
    """`names` with the stored name of one side of a tie for the other side too, where that has none."""
    shared = dict(names)
    pairs = list(ties)
    for _ in range(2):  # a third name of a group may be the one that is stored
        for target, source in pairs:
            for here, there in ((source, target), (target, source)):
                if here not in shared and there in shared:
                    shared[here] = shared[there]
    return shared


def missing_tensors(where: object, kind: str, missing: list[str], unused: list[str]) -> ModelError:
    """One error for all tensors of the model that its files lack; `unused` are those that fit nothing.

    where: the folder; kind: the model's class.
    """
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    said = f"{where} stores no tensor for {', '.join(missing[:3])}{more}"
    parts = {part for name in unused for part in name.split(".")}
    wrapper = next((part for part in WRAPPERS if part in parts), None)
    if wrapper is not None:
        example = next(name for name in unused if wrapper in name.split("."))
        return ModelError(f"{said}; its names are those of a wrapper, such as {example}", hint=WRAPPERS[wrapper])
    if unused:
        return ModelError(
            f"{said}; it stores {', '.join(unused[:3])}{' and others' if len(unused) > 3 else ''}, which {kind} lacks",
            hint="config.json and the weights are of different models, or of another version of it",
        )
    return ModelError(said, hint="is the download complete?")


class FileWatch:
    """Notices when a file of `folder` is no longer the one that was first seen.

    A job reads its source for hours and says in the result what it read. Size, time of change and identity of each
    file are compared around every read; where they differ, the digest decides, so a file that was only touched counts
    as the same.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stamps: dict[str, tuple[int, int, int, int]] = {}
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

    def _stamp(self, file: str) -> tuple[int, int, int, int]:
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
