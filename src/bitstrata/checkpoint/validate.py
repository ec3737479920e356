"""Check a whole checkpoint and say everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointError
from .reader import CheckpointReader


def validate(folder: str | Path) -> list[str]:
    """All problems of the checkpoint in `folder`, each one sentence that names file and tensor.

    Reads every byte of quantized layers and of files with a digest: structure, digests, finite scales, padding bits.
    An empty list means valid.
    `CheckpointReader.covers_config` says whether config.json has digests. Never raises for malformed input.
    """
    try:
        reader = CheckpointReader(folder, verify=True, checked=False)
    except CheckpointError as error:
        return [error.message]

    problems = [f"layer {name} has no guard tensor" for name in reader.missing_guards()]
    spec = reader.spec
    broken = {}
    for layer in spec.layers:
        broken[layer] = [problem.message for problem in reader.layer_problems(layer)]
        problems += broken[layer]
    for name, (layer, _) in spec.linears.items():
        if not broken[layer]:
            problems += _value_problems(reader, name, spec.layers[layer].in_features)
    problems += [problem.message for problem in reader.other_problems()]
    return list(dict.fromkeys(problems))  # a file that cannot be read is a problem of each of its tensors


def _value_problems(reader: CheckpointReader, name: str, columns: int) -> Iterator[str]:
    """What is wrong with the values of one linear's planes and scales."""
    try:
        weight = reader.layer(name)
    except CheckpointError as error:
        yield error.message
        return
    tail = columns % 32
    if tail:
        mask = -1 << tail
        for index, plane in enumerate(weight.planes):
            if bool((plane[:, -1] & mask).any()):
                yield f"{name}.plane_{index}: padding bits past column {columns - 1} are set"
