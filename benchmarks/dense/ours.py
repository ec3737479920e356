"""Our own methods, through `bitstrata.quantize`, and checkpoints that are there already.

    nested                          a method, at its defaults and 2-4 bits in one file
    nested:preset=best:head_bits=6  with a preset, the head as planes, other bits
    gptq:bits=2                     methods of one precision: a file each
    nested:growth=3                 any other name is an option of the method
    checkpoint:name=nested:folder=OUT   a checkpoint that is there; seconds=, cpu_seconds= tell what its log says

The weights are what FORMAT.md says that the planes mean (`bitstrata.planes.decode`). Bytes are those of a prefix:
planes, scales and offsets.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

import bitstrata
from bitstrata.calibration import Windows
from bitstrata.checkpoint import CheckpointReader
from bitstrata.errors import CheckError
from bitstrata.planes import decode
from bitstrata.plans import parse_bits
from bitstrata.version import __version__

from .made import Job, Made, Options, taken

METHODS = ("nested", "rtn", "gptq", "bpdq", "bcq", "anybcq", "anyprecision")
CHECKPOINT = "checkpoint"


def missing() -> str | None:
    return None


def versions() -> dict[str, str]:
    return {"bitstrata": __version__}


def make(job: Job, options: Options) -> Iterator[Made]:
    method = options.pop("maker")
    if method == CHECKPOINT:
        folder = Path(taken(options, "folder", ""))
        _check_windows(folder, job)
        return precisions(folder)
    bits, head = parse_bits(taken(options, "bits", "2-4")), options.pop("head_bits", None)
    known = {"preset": taken(options, "preset", "default"), "group_size": int(taken(options, "group_size", "128"))}
    given, folder = dict(options), job.work / "checkpoint"
    options.clear()
    bitstrata.quantize(
        job.model,
        folder,
        bits=bits,
        method=method,
        options=given,
        calibration=job.calibration,
        num_samples=len(job.windows),
        seq_len=job.windows.shape[1],
        seed=job.seed,
        head_bits=None if head is None else int(head),
        **known,
    )
    _check_windows(folder, job)
    return precisions(folder)


def precisions(folder: Path) -> Iterator[Made]:
    """What the checkpoint in `folder` holds, at each of its bits."""
    reader = CheckpointReader(folder)
    spec = reader.spec
    head: dict[str, Tensor] = {}
    head_bits = None
    for name in sorted(spec.whole_layers):
        weight = reader.layer(name)
        (head_bits,) = weight.scales
        layer, head[f"{name}.weight"] = spec.layers[name], decode(weight, head_bits)
        if layer.tied is not None:
            head[f"{layer.tied}.weight"] = head[f"{name}.weight"].clone()
    for bits in spec.bits:
        weights = {f"{name}.weight": decode(reader.layer(name), bits) for name in spec.planned_layers}
        read = spec.fixed_bytes_read
        yield Made(bits, weights, spec.bytes_read(bits) - read, head, head_bits, read if head else None)


def _check_windows(folder: Path, job: Job) -> None:
    """Raise CheckError if the method calibrated on other windows than the peers; those that need none have none."""
    found = CheckpointReader(folder).spec.provenance.get("windows_sha256")
    unused = Windows(job.windows[:0], job.cut.heldout)
    if found not in (job.cut.digest(), unused.digest()):
        raise CheckError(f"{folder} was calibrated on other windows than those of this comparison")
