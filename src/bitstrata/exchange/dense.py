"""A model in plain safetensors: the decoded weights, for transformers and all that reads its folders.

A decoded weight is a sum of fp16 numbers and has up to 17 significant bits: fp32 holds it, bf16 rounds it to 8, fp16 to
11. Tensors that are not quantized stay as they are, unless a dtype is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import TensorEntry, write_json, write_safetensors
from ..checkpoint.schema import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from ..errors import CheckError, UsageError
from ..models import SourceModel
from ..progress import Steps
from ..quantization.companions import companions, copy_companions
from .chosen import Chosen
from .folder import check_room, whole
from .result import Written, distance
from .tensors import model_tensors

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHARD_BYTES = 5_000_000_000


def write_dense(chosen: Chosen, output: Path, dtype: str) -> tuple[list[Written], int]:
    """Write the model to the folder `output`; the layers as they were written, and the bytes of all weights.

    dtype: a name of `DTYPES`, or auto: that of the model.

    Raises UsageError for another dtype, CheckError if transformers would not take what was written.
    """
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"dtype {dtype!r} is not known", hint=f"auto, {', '.join(DTYPES)}")
    kind = chosen.dtype if dtype == "auto" else DTYPES[dtype]
    written: list[Written] = []

    def rounded(name: str) -> Tensor:
        exact = chosen.decoded(name)
        value = exact.to(kind)
        as_type = str(kind).removeprefix("torch.")
        written.append(Written(name, as_type, chosen.bits[name], value.nbytes, *distance(exact, value)))
        return value

    entries = list(model_tensors(chosen, kind, rounded, None if dtype == "auto" else kind))
    size = sum(entry.nbytes for entry in entries)
    check_room(output, size + sum(path.stat().st_size for path in companions(chosen)))
    with whole(output) as folder:
        folder.mkdir()
        with Steps("writing", len(entries), "tensor") as steps:
            write_shards(folder, [_counted(entry, steps.step) for entry in entries], SHARD_BYTES)
        copy_companions(chosen, folder)
        config = {key: value for key, value in chosen.reader.config.items() if key != "quantization_config"}
        if dtype != "auto":
            config = {**config, "dtype": dtype}
            config.pop("torch_dtype", None)
        write_json(folder / CONFIG_FILE, config)
        _check(folder)
    return written, size


def write_shards(folder: Path, entries: Sequence[TensorEntry], most: int) -> None:
    """`entries` in files of up to `most` bytes, with an index if there are several."""
    shards: list[list[TensorEntry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(one.nbytes for one in shards[-1]) + entry.nbytes > most:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        write_safetensors(folder / SINGLE_FILE, entries)
        return
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard)
    weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
    metadata = {"total_size": sum(entry.nbytes for entry in entries)}
    write_json(folder / INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})


def _counted(entry: TensorEntry, step: Callable[[], None]) -> TensorEntry:
    def read() -> Tensor:
        tensor = entry.read()
        step()
        return tensor

    return TensorEntry(entry.name, entry.dtype, entry.shape, read)


def _check(folder: Path) -> None:
    """Raise CheckError unless every tensor of the model that config.json describes is in `folder`."""
    source = SourceModel(folder)
    missing = [name for name in source.skeleton().state_dict() if source.stored_name(name) is None]
    if missing:
        raise CheckError(
            f"transformers would miss {missing[0]} in what was written", hint="this model cannot be exported as dense"
        )
