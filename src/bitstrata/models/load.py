"""`bitstrata.load`: a runnable model from a checkpoint folder or hub id, with only the planes it needs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from ..checkpoint import Budget, CheckpointReader, Fingerprint, Plan, parse_budget
from ..errors import BitstrataError, CheckpointError, UnsupportedBitsError, UsageError
from ..memory import is_out_of_memory
from ..nn import Bits, RowBits, bits_state
from ..options import named
from ..planes import whole_number
from ..torch_state import ordinary_torch
from .architecture import causal_class
from .described import read_config, read_generation_config
from .fit import fit_budget
from .hf import replace_layers
from .hub import first_line, resolve
from .resize import Pages, Size

Chosen = TypeVar("Chosen", bound=int | Plan)


def parse_target(target: str) -> tuple[str, int | None]:
    """Split `OUT:BITS` into the path and bits; `OUT` alone gives None."""
    head, colon, tail = target.rpartition(":")
    if colon and head and tail.isdigit():
        return head, int(tail)
    return target, None


def choose_bits(target: str, bits: Chosen | None) -> tuple[str, Chosen | int | None]:
    """The folder or hub id, and the bits, from `OUT[:BITS]` and a separate `bits`.

    A folder that exists under the whole name is taken as it is. Raises UsageError if both name bits
    and differ.
    """
    name, named = (target, None) if os.path.isdir(target) else parse_target(target)
    if named is not None and bits is not None and named != bits:
        raise UsageError(f"bits given twice: {named} in {target} and {bits} in --bits", hint="give one of them")
    return name, _whole(bits) if bits is not None else named


def pick_device(device: str | torch.device) -> torch.device:
    """`auto` is the first GPU if there is one, else the CPU. Raises UsageError for an unusable device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"{device!r} is not a device", hint="use auto, cpu, cuda or cuda:1") from error
    if chosen.type not in ("cpu", "cuda"):
        raise UsageError(f"device {device} is not supported", hint="use auto, cpu, cuda or cuda:1")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {device} was asked for, but this torch sees no GPU", hint="use --device cpu")
    return chosen


@named
@ordinary_torch()
def load(
    path_or_id: str | Path,
    bits: Bits | None = None,
    device: str | torch.device = "auto",
    max_bits: int | None = None,
    *,
    plan: int | Mapping[str, int] | str | Path | None = None,
    budget: str | Budget | None = None,
    fit: bool = False,
    context: int | None = None,
    dtype: torch.dtype | str | None = None,
    verify: bool = False,
) -> PreTrainedModel:
    """Load a quantized model: whole, or with `plan`, `budget` or `fit` only the pages of one plan.

    A model with one plan's pages runs that plan and nothing else, holds its bytes and no more, and has
    `resize(plan_or_budget)` (models/resize.py).

    Args:
        path_or_id: a folder written by `bitstrata quantize`, or a hub id of one.
        bits: what it runs at until told otherwise; the highest loaded by default.
        device: auto, cpu, cuda, cuda:N.
        max_bits: read only planes 0..max_bits-1 from disk; higher bits are then not available.
        plan: bits for every quantized layer, a file that `bitstrata plan` wrote, or one int for all layers.
        budget: "600MB" for the whole model, "3.2bpw"; needs the page order that `bitstrata plan` stores in the folder,
            unless it is the smallest plan or covers everything.
        fit: the largest budget that the free memory leaves (models/fit.py).
        context: with `fit`, tokens to leave room for in the cache of keys and values; the model's context by default.
        dtype: of activations and unquantized weights, or its name; the stored one by default.
        verify: compare each file and config.json with the digests in the index, which reads the files once more; a
            model with one plan's pages compares the others when it first reads from them. Without it, files are checked
            to be whole and as config.json describes them, and a changed byte among the weights goes unnoticed, as with
            other loaders: `bitstrata inspect OUT --verify` after a download or a copy.

    Returns:
        A transformers model whose `forward` and `generate` take `bits=`.

    Raises:
        CheckpointError: something is missing or malformed; the tensor and file are named. Also a `quantization_config`
            that is not as it was written; other changes of config.json are a note.
        PlanError: a plan or the page order is malformed or of another model, or there is no order.
        UnsupportedBitsError: `bits` or `max_bits` is not available in the file.
        UsageError: a budget below the smallest plan, more than one way of saying how much to load, or an argument of
            the wrong type.
        ResourceError: with `fit`, not even the smallest plan fits into memory.
    """
    pages_of = {"plan": plan, "budget": budget, "fit": fit or None}
    paged = any(value is not None for value in pages_of.values())
    given = [name for name, value in {"bits": bits, "max_bits": max_bits, **pages_of}.items() if value is not None]
    if paged and len(given) > 1:
        raise UsageError(f"{' and '.join(given)} each say how much to load", hint="give one of them")
    if context is not None and not fit:
        raise UsageError("context says how much memory `fit` leaves for the cache", hint="give it together with fit")
    for name, count in (("max_bits", max_bits), ("context", context)):
        if count is not None and whole_number(count) is None:
            raise UsageError(f"{name}={count!r} is not a whole number")
    bits, plan, max_bits = _whole(bits), _whole(plan), _whole(max_bits)
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(f"dtype={dtype!r} is not a floating-point dtype of torch", hint="for example torch.bfloat16")
    if bits is not None and (isinstance(bits, bool) or not isinstance(bits, (int, Mapping, torch.Tensor, RowBits))):
        raise UsageError(
            f"bits={bits!r} is neither a number of bits nor a plan",
            hint=f"plan={bits!r} takes a plan's file"
            if isinstance(bits, (str, Path))
            else "bits are an int, or a plan",
        )
    # a model with one plan's pages may be resized to any other plan, so it needs all files
    folder = resolve(path_or_id, kind="bitstrata checkpoint", max_bits=None if paged else max_bits)
    where = pick_device(device)
    reader = CheckpointReader(folder, max_bits=max_bits, verify=verify, paged=paged)
    reader.note_changes()
    config = read_config(folder, reader)
    generation = read_generation_config(folder, getattr(config.get_text_config(decoder=True), "vocab_size", None))
    if isinstance(bits, int) and bits not in reader.bits:
        raise UnsupportedBitsError(bits, reader.bits, where=str(folder))
    if isinstance(bits, Plan):
        bits.check(reader)
    if paged:
        pages = Pages(folder, verify=verify, dtype=dtype)
        size: Size
        if fit:
            size = fit_budget(pages.sizes, config, where, context, dtype)
        elif budget is not None:
            size = parse_budget(budget)
        else:
            assert plan is not None
            size = Path(plan) if isinstance(plan, str) else plan
        chosen = pages.plan(size)

    # On a CPU the mapped file is the weight; elsewhere transformers copies tensor by tensor.
    placement: dict[str, Any] = {} if where.type == "cpu" else {"device_map": {"": where}}
    model = _build(folder, reader, config, dtype, placement)
    model.name_or_path = str(folder)
    if generation is not None:
        model.generation_config = generation
    bits_state(model).made_from = Fingerprint.of(reader)
    if paged:
        model.bitstrata_pages = pages  # type: ignore[assignment]
        pages.resize(model, chosen)
    if bits is not None:
        bits_state(model).set(bits)
    return model


def _whole(value: Any) -> Any:
    """`value`, a whole number of NumPy or torch as an int."""
    whole = whole_number(value)
    return value if whole is None else whole


def _build(
    folder: Path, reader: CheckpointReader, config: Any, dtype: torch.dtype | None, placement: dict[str, Any]
) -> PreTrainedModel:
    """The model with the reader's tensors in it; CheckpointError unless they fit it one to one."""
    tensors = reader.state_dict()
    try:
        if reader.paged:
            config.quantization_config = dict(config.quantization_config, paged=True)
        else:
            config.quantization_config = _restricted(config.quantization_config, reader)
        model_class, own = causal_class(config)
        own.quantization_config = config.quantization_config
        model, info = model_class.from_pretrained(
            None,
            config=own,
            state_dict=tensors,
            dtype=dtype or own.dtype or reader.dtype or torch.float32,
            output_loading_info=True,
            **placement,
        )
    except BitstrataError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = _misfit(folder, reader) or first_line(error)
        raise CheckpointError(
            f"{folder} does not fit the model that its config.json describes: {reason}",
            hint="the folder was changed after it was written; copy or download it again",
        ) from error
    for kind, what in (("missing_keys", "stores no tensor for"), ("unexpected_keys", "stores an unknown tensor")):
        if info[kind]:
            raise CheckpointError(
                f"{folder} {what} {min(info[kind])}", hint="config.json and the weights are of different models"
            )
    built: PreTrainedModel = model
    return built


def _misfit(folder: Path, reader: CheckpointReader) -> str | None:
    """The first tensor whose shape is not the model's, in words: transformers says that there is one, but not which.

    None if there is none, or if there can be no such model at all.
    """
    try:
        config = read_config(folder, reader)
        with torch.device("meta"):
            model_class, own = causal_class(config)
            model = model_class(own)
            replace_layers(model, reader.spec)
        shapes = {name: tuple(place.shape) for name, place in model.state_dict().items()}
    except Exception:
        return None
    for name in sorted(reader.common_names() & shapes.keys()):
        found = reader.tensor_spec(name)[1]
        if found != shapes[name]:
            return f"{name} is {list(found)} in {reader.weight_map[name]}, {list(shapes[name])} in the model"
    return None


def _restricted(raw: dict[str, Any], reader: CheckpointReader) -> dict[str, Any]:
    """The quantization config without the bits above the reader's max_bits."""
    spec = dict(raw, bits=list(reader.bits))
    spec["layers"] = {
        name: {**layer, "bits": list(reader.spec.layer_bits(name, reader.max_bits))} if layer.get("bits") else layer
        for name, layer in raw["layers"].items()
    }
    return spec
