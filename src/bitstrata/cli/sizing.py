"""What the verbs that run a model share: how much of it to load."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..errors import UsageError
from ..kernels.cached import check_kv_cache_dtype
from ..options import Size
from ..plans import Plan, load


def load_sized(
    target: str, bits: int | Plan | None, size: Size, *, context: int | None, max_bits: int | None = None
) -> PreTrainedModel:
    """`load` at the bits or the size that a command line asks for. Of a plan only its pages are read.

    Args:
        context: tokens that `fit` leaves room for; None for the model's context.
        max_bits: planes to read where bits are not a plan and there is neither a budget nor `fit`.

    Raises UsageError for bits and a budget or `fit`, or for both of these.
    """
    flags = {"bits": bits is not None, "--budget": size.budget is not None, "--fit": size.fit}
    given = [flag for flag, is_given in flags.items() if is_given]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} each say how much of the model to run", hint="give one of them")
    check_kv_cache_dtype(size.kv_cache_dtype)  # before a model is read
    shared: dict[str, Any] = {"device": size.device, "adapter": size.adapter, **vars(size.hub)}
    if isinstance(bits, Plan):
        return load(target, plan=bits, **shared)
    if size.budget is None and not size.fit:
        return load(target, bits=bits, max_bits=max_bits, **shared)
    context = context if size.fit else None
    return load(
        target,
        budget=size.budget,
        fit=size.fit,
        context=context,
        kv_cache_dtype=size.kv_cache_dtype if size.fit else "auto",
        **shared,
    )
