"""Check a whole checkpoint and say everything that is wrong with it."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from .reader import CheckpointReader


def validate(folder: str | Path) -> list[str]:
    """All problems of the checkpoint in `folder`, each one sentence that names file and tensor.

    Reads every byte: structure, digests, finite scales, padding bits. An empty list means valid.
    Never raises for malformed input.
    """
    try:
        reader = CheckpointReader(folder, verify=True)
    except CheckpointError as error:
        return [error.message]

    problems = [f"layer {name} has no guard tensor" for name in reader.missing_guards()]
    for name, spec in reader.spec.layers.items():
        try:
            weight = reader.layer(name)
        except CheckpointError as error:
            problems.append(error.message)
            continue
        tail = spec.in_features % 32
        if tail:
            mask = -1 << tail
            for index, plane in enumerate(weight.planes):
                if bool((plane[:, -1] & mask).any()):
                    problems.append(f"{name}.plane_{index}: padding bits past column {spec.in_features - 1} are set")
    unread = reader.common_names()
    for file in sorted({reader.weight_map[name] for name in unread}):
        try:
            reader.shard(file)
        except CheckpointError as error:
            problems.append(error.message)
            unread = frozenset(name for name in unread if reader.weight_map[name] != file)
    for name in sorted(unread):
        try:
            reader.read(name)
        except CheckpointError as error:
            problems.append(error.message)
    return problems
