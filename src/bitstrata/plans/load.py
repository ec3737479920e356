"""`bitstrata.load`: a runnable model from a checkpoint folder or hub id, at any size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UnsupportedBitsError, UsageError
from ..kernels.cached import check_kv_cache_dtype
from ..models import add_stored, check_peft, open_checkpoint, resolve
from ..nn import Bits
from ..options import FromHub
from ..planes import whole_number
from ..torch_state import ordinary_torch
from ..verbs import named
from .budget import Budget, parse_budget
from .fit import fit_budget
from .parsing import as_whole
from .plan import Plan
from .resize import Pages


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
    kv_cache_dtype: str = "auto",
    dtype: torch.dtype | str | None = None,
    verify: bool = False,
    adapter: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> PreTrainedModel:
    """Load a quantized model: whole, or with `plan`, `budget` or `fit` only the pages of one plan.

    A model with one plan's pages runs that plan and nothing else, holds its bytes and no more, and has
    `resize(plan_or_budget)` (plans/resize.py).

    Args:
        path_or_id: a folder written by `bitstrata quantize`, or a hub id of one.
        bits: what it runs at until told otherwise (`use_bits`); the highest loaded by default.
        device: auto, cpu, cuda, cuda:N.
        max_bits: read only planes 0..max_bits-1 from disk; higher bits are then not available.
        plan: bits for every quantized layer, a file that `bitstrata plan` wrote, or one int for all layers.
        budget: "600MB" for the whole model, "3.2bpw"; needs the page order that `bitstrata plan` stores in the folder,
            unless it is the smallest plan or covers everything.
        fit: the largest budget that the free memory leaves (plans/fit.py).
        context: with `fit`, tokens to leave room for in the cache of keys and values; the model's context by default.
        kv_cache_dtype: with `fit`, how that cache will keep them: auto (the model's dtype), int8 or int4.
        dtype: of activations and unquantized weights, or its name; the stored one by default.
        verify: compare each file and config.json with the digests in the index, which reads the files once more; a
            model with one plan's pages compares the others when it first reads from them. Without it, files are checked
            to be whole and as config.json describes them, and a changed byte among the weights goes unnoticed, as with
            other loaders: `bitstrata inspect OUT --verify` after a download or a copy.
        adapter: folder or hub id of a LoRA adapter to run it with (models/adapters.py); needs the extra `lora`.
        revision: of a hub id: a branch, tag or commit.
        token: for the hub, where it asks for one; HF_TOKEN by default. Also for `adapter`.
        cache_dir: where the hub's files are kept; HF_HUB_CACHE by default. Also for `adapter`.

    Returns:
        A transformers model whose `forward` and `generate` take `bits=`.

    Raises:
        CheckpointError: something is missing or malformed; the tensor and file are named. Also a `quantization_config`
            that is not as it was written; other changes of config.json are a note.
        PlanError: a plan or the page order is malformed or of another model, or there is no order.
        UnsupportedBitsError: `bits` or `max_bits` is not available in the file.
        InputError: the adapter is not there, or of another model.
        UsageError: a budget below the smallest plan, more than one way of saying how much to load, or an argument of
            the wrong type.
        ResourceError: with `fit`, not even the smallest plan fits into memory.
    """
    bits, plan, max_bits = as_whole(bits), as_whole(plan), as_whole(max_bits)
    sizes = {"plan": plan, "budget": budget, "fit": fit or None}
    _check_arguments({"bits": bits, "max_bits": max_bits, **sizes}, context, kv_cache_dtype)
    dtype = _as_dtype(dtype)
    if adapter is not None:
        check_peft()
    paged = any(size is not None for size in sizes.values())
    # a model with one plan's pages may be resized to any other plan, so it needs all files
    hub = FromHub(revision=revision, token=token, cache_dir=cache_dir)
    folder = resolve(path_or_id, hub=hub, kind="bitstrata checkpoint", max_bits=None if paged else max_bits)
    opened = open_checkpoint(folder, device, max_bits=max_bits, dtype=dtype, verify=verify, paged=paged)
    reader = opened.reader
    if isinstance(bits, int) and bits not in reader.bits:
        raise UnsupportedBitsError(bits, reader.bits, where=str(folder))
    if isinstance(bits, Plan):
        bits.check(reader)
    if not paged:
        model = opened.build()
        if bits is not None:
            model.bits = bits  # type: ignore[assignment]
        return model if adapter is None else _with_adapter(model, adapter, hub)
    pages = Pages(folder, verify=verify, dtype=dtype)
    size: Any = Path(plan) if isinstance(plan, str) else plan
    if fit:
        size = fit_budget(pages.sizes, opened.config, opened.device, context, dtype, kv_cache_dtype=kv_cache_dtype)
    elif budget is not None:
        size = parse_budget(budget)
    chosen = pages.plan(size)
    model = opened.build()
    model.pages = pages  # type: ignore[assignment]
    pages.exchange(model, chosen)
    return model if adapter is None else _with_adapter(model, adapter, hub)


def _with_adapter(model: PreTrainedModel, adapter: str | Path, hub: FromHub) -> PreTrainedModel:
    add_stored(model, adapter, hub.other)
    return model


def _check_arguments(given: dict[str, Any], context: int | None, kv_cache_dtype: str) -> None:
    """Raise UsageError for arguments of `load` that contradict each other or are of the wrong type."""
    sizes = [name for name, value in given.items() if value is not None]
    if len(sizes) > 1 and sizes != ["bits", "max_bits"]:
        raise UsageError(f"{' and '.join(sizes)} each say how much to load", hint="give one of them")
    if context is not None and not given["fit"]:
        raise UsageError("context says how much memory `fit` leaves for the cache", hint="give it together with fit")
    if check_kv_cache_dtype(kv_cache_dtype) != "auto" and not given["fit"]:
        raise UsageError(
            f"kv_cache_dtype={kv_cache_dtype!r} says how much memory `fit` leaves for the cache",
            hint="give it together with fit, and to what runs the model: generate, Conversation or Engine",
        )
    for name, count in (("max_bits", given["max_bits"]), ("context", context)):
        if count is not None and whole_number(count) is None:
            raise UsageError(f"{name}={count!r} is not a whole number")
    bits = given["bits"]
    if bits is not None and (isinstance(bits, bool) or not isinstance(bits, (int, Mapping, Tensor, list, tuple))):
        raise UsageError(
            f"bits={bits!r} is neither a number of bits nor a plan",
            hint=f"plan={bits!r} takes a plan's file"
            if isinstance(bits, (str, Path))
            else "bits are an int, or a plan",
        )


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    chosen = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if chosen is not None and not (isinstance(chosen, torch.dtype) and chosen.is_floating_point):
        raise UsageError(f"dtype={dtype!r} is not a floating-point dtype of torch", hint="for example torch.bfloat16")
    return chosen
