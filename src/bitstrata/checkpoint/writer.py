"""Write checkpoints: tensors streamed one at a time, files renamed when whole, `config.json` last.

`write_safetensors` is our own because the library's writer wants every tensor of a file in memory;
a plane shard of a large model is larger than what one block needs. The header is the documented
one: 8 bytes little-endian length, JSON padded with spaces to 8 bytes, then the data without gaps.
Peak memory is one tensor.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import disk_errors
from ..planes.weights import PlaneWeight
from .config_digest import config_digests
from .schema import CONFIG_FILE, DTYPE_NAMES, INDEX_FILE, REPORT_FILE, QuantizationSpec, guard_name, shard_of

TEMPORARY = ".bitstrata-tmp"
READ_BYTES = 1 << 20
SEAL_BYTES = hashlib.sha256().digest_size
SEAL = "bitstrata.sha256"  # the last tensor of a sealed file: the digest of all that stands before it


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to be written: `read` is called once, when its bytes are due."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorEntry:
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def entries_of(layer: str, weight: PlaneWeight) -> list[TensorEntry]:
    """The planes and scales of one layer as entries with their full names."""
    return [TensorEntry.of(f"{layer}.{name}", tensor) for name, tensor in weight.tensors().items()]


def merge_experts(spec: QuantizationSpec, entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    """`entries` with those of single experts merged as they are stored: one for all, read when it is written.

    Raises ValueError if an expert lacks a tensor that others have.
    """
    merged: dict[str, dict[int, TensorEntry]] = {}
    result = []
    for entry in entries:
        layer, _, key = entry.name.rpartition(".")
        home, expert = spec.linears.get(layer, (layer, None))
        if expert is None:
            result.append(entry)
        else:
            merged.setdefault(f"{home}.{key}", {})[expert] = entry
    for name, found in merged.items():
        home = name.rpartition(".")[0]
        count = spec.layers[home].experts or 0
        if found.keys() != set(range(count)):
            raise ValueError(f"{name}: experts {sorted(found)} of {count} have it")
        parts = [found[expert] for expert in range(count)]
        first = parts[0]
        if name == guard_name(home):
            result.append(TensorEntry(name, first.dtype, first.shape, first.read))
            continue
        result.append(
            TensorEntry(
                name,
                first.dtype,
                (len(parts), *first.shape),
                lambda parts=parts: torch.stack([part.read() for part in parts]),  # type: ignore[misc]
            )
        )
    return result


def _replace_when_whole(path: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Write `chunks` under a temporary name, sync, rename to `path`; returns the sha256 of the bytes."""
    temporary = path.with_name(path.name + TEMPORARY)
    digest = hashlib.sha256()
    try:
        with disk_errors(path):
            with open(temporary, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                    digest.update(chunk)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can."""
    with contextlib.suppress(OSError):  # Windows cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def copy_file(source: Path, target: Path) -> None:
    """Copy a small file; the copy appears whole or not at all."""
    _replace_when_whole(target, [source.read_bytes()])


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON; the file appears whole or not at all."""
    _replace_when_whole(path, [(json.dumps(value, indent=2) + "\n").encode()])


def write_safetensors(
    path: Path, entries: Sequence[TensorEntry], metadata: Mapping[str, str] | None = None, *, sealed: bool = False
) -> str:
    """Write `entries` to a safetensors file and return its sha256. Equal entries give equal bytes.

    `sealed`: the file carries its own digest, for `has_right_seal`.
    """
    if len({entry.name for entry in entries}) < len(entries):
        raise ValueError(f"{path.name}: two entries have the same name")
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for entry in ordered:
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.nbytes],
        }
        position += entry.nbytes
    if sealed:
        header[SEAL] = {"dtype": "U8", "shape": [SEAL_BYTES], "data_offsets": [position, position + SEAL_BYTES]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def chunks() -> Iterable[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for entry in ordered:
            tensor = entry.read()
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                raise ValueError(f"{entry.name}: announced {entry.dtype} {entry.shape}, got {tensor.shape}")
            if tensor.numel():
                raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
                yield memoryview(raw.numpy())  # type: ignore[arg-type]

    return _replace_when_whole(path, _sealed(chunks()) if sealed else chunks())


def _sealed(chunks: Iterable[bytes | memoryview]) -> Iterable[bytes | memoryview]:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
    yield digest.digest()


def has_right_seal(path: Path) -> bool:
    """Whether `path` ends in the sha256 of all that stands before it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - SEAL_BYTES
        while left > 0 and (chunk := file.read(min(left, READ_BYTES))):
            digest.update(chunk)
            left -= len(chunk)
        return file.read() == digest.digest()


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], entries: Sequence[TensorEntry], report: Mapping[str, Any] | None = None
) -> None:
    """Write a whole checkpoint: shards by concern, index with digests, report, `config.json` last.

    `config` is the model's config including `quantization_config`. A folder without `config.json`
    is not a model, so an interrupted write never leaves something that loads.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).unlink(missing_ok=True)
    layers = config.get("quantization_config", {}).get("layers", {})
    whole = frozenset(name for name, layer in layers.items() if layer.get("role") is not None)
    homes = {entry.name: shard_of(entry.name, whole) for entry in entries}
    shards: dict[str, list[TensorEntry]] = {}
    for entry in entries:
        shards.setdefault(homes[entry.name], []).append(entry)

    digests = {name: write_safetensors(folder / name, shards[name]) for name in sorted(shards)}
    index = {
        "metadata": {
            "total_size": sum(entry.nbytes for entry in entries),
            "sha256": digests,
            "config_sha256": config_digests(config),
        },
        "weight_map": {name: homes[name] for name in sorted(homes)},
    }
    write_json(folder / INDEX_FILE, index)
    if report is not None:
        write_json(folder / REPORT_FILE, report)
    write_json(folder / CONFIG_FILE, dict(config))


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that a killed writer left behind."""
    for path in folder.glob(f"*{TEMPORARY}"):
        path.unlink(missing_ok=True)
