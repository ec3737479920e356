"""`bitstrata.export_model`: one precision of a checkpoint as another program's file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from .. import arguments
from ..errors import UsageError
from ..options import ExportOptions
from ..plans import bits_name
from ..progress import notes, own_notes
from ..torch_state import ordinary_torch
from ..verbs import verb
from .chosen import Chosen
from .dense import DTYPES, write_dense
from .divergence import divergence
from .gguf_export import GGUFExport
from .gguf_types import Asked
from .gptq_export import GPTQExport
from .result import Export, Written

Result = tuple[list[Written], int, Callable[[str], Tensor]]  # layers, bytes, and a linear's weight as it was written


def _dense(chosen: Chosen, output: Path, options: ExportOptions) -> Result:
    layers, size = write_dense(chosen, output, options.dtype)
    dtype = chosen.dtype if options.dtype == "auto" else DTYPES[options.dtype]
    return layers, size, lambda name: chosen.decoded(name, dtype).float()


def _gguf(chosen: Chosen, output: Path, options: ExportOptions) -> Result:
    export = GGUFExport(chosen, Asked.parse(options.types), refit=options.refit)
    size = export.write(output)
    return export.layers, size, export.written(output)


def _gptq(chosen: Chosen, output: Path, options: ExportOptions) -> Result:
    export = GPTQExport(chosen, options.types, refit=options.refit)
    size = export.write(output, chosen.dtype)
    return export.layers, size, export.written(output, chosen.dtype)


WRITERS: dict[str, Callable[[Chosen, Path, ExportOptions], Result]] = {
    "dense": _dense,
    "gguf": _gguf,
    "gptq": _gptq,
}


@verb(ExportOptions)
@ordinary_torch()
@own_notes()
def export_model(options: ExportOptions) -> Export:
    """Write a quantized model at one number of bits for other programs: plain safetensors, GGUF or GPTQ.

    Memory is one weight, and with `text` two models in fp32.

    Raises:
        CheckpointError, UnsupportedBitsError, PlanError: what the checkpoint lacks.
        UsageError: a format that does not hold these weights, without `refit`; an architecture that it does not know;
            an output that is there already.
        ResourceError: the disk has no room for it.
        CheckError: the result is not what the other program reads.
    """
    if options.format not in WRITERS:
        raise UsageError(f"format {options.format!r} is not known", hint=f"one of {', '.join(WRITERS)}")
    if options.types and options.format == "dense":
        raise UsageError("dense has no types", hint="--dtype says how its numbers are written")
    if options.dtype != "auto" and options.format != "dense":
        raise UsageError(f"dtype is for dense; {options.format} has types", hint="--type F16, or Q8_0")
    output = Path(arguments.path("the output", options.output, hint="give the file or folder to write"))
    chosen = Chosen(options.model, options.bits, options.hub)
    layers, size, weight = WRITERS[options.format](chosen, output, options)
    measured = None if options.text is None else divergence(chosen, weight, options.text)
    return Export(
        output=str(output),
        format=options.format,
        model=str(chosen.folder),
        bits=bits_name(chosen.asked),
        bytes=size,
        layers=tuple(layers),
        text=None if options.text is None else str(options.text),
        kld=None if measured is None else measured.kld,
        top1_agreement=None if measured is None else measured.top1_agreement,
        tokens=0 if measured is None else measured.tokens,
        notes=notes(),
    )
