"""What the verbs that run a model share: how much of it to load."""

from __future__ import annotations

import typer
from transformers import PreTrainedModel

from ..errors import UsageError
from ..plans import Plan, load

BUDGET_OPTION = typer.Option(
    None, help="Load no more than this: 600MB for the whole model, 3.2bpw. Needs OUT's page order (bitstrata plan)."
)
FIT_OPTION = typer.Option(
    False, "--fit", help="Load as much as the free memory holds beside the cache of keys and values."
)


def load_sized(
    target: str,
    bits: int | Plan | None,
    *,
    budget: str | None,
    fit: bool,
    context: int | None,
    device: str,
    max_bits: int | None = None,
) -> PreTrainedModel:
    """`load` at the bits or the size that a command line asks for. Of a plan only its pages are read.

    Args:
        context: tokens that `fit` leaves room for; None for the model's context.
        max_bits: planes to read where bits are not a plan and there is neither a budget nor `fit`.

    Raises UsageError for bits and a budget or `fit`, or for both of these.
    """
    flags = {"bits": bits is not None, "--budget": budget is not None, "--fit": fit}
    given = [flag for flag, is_given in flags.items() if is_given]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} each say how much of the model to run", hint="give one of them")
    if isinstance(bits, Plan):
        return load(target, plan=bits, device=device)
    if budget is None and not fit:
        return load(target, bits=bits, device=device, max_bits=max_bits)
    return load(target, budget=budget, fit=fit, context=context if fit else None, device=device)
