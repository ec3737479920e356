"""Check a whole checkpoint and say everything that is wrong with it."""

from __future__ import annotations

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
    for name, spec in reader.spec.layers.items():
        found = [problem.message for problem in reader.layer_problems(name)]
        problems += found
        if found:
            continue
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
    problems += [problem.message for problem in reader.other_problems()]
    return list(dict.fromkeys(problems))  # a file that cannot be read is a problem of each of its tensors
