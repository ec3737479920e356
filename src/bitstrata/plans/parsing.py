"""Bits and plans from what a user types."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from typing import Any, TypeVar

from ..arguments import parse_bits
from ..errors import UsageError
from ..nn import BitsOrPlan
from ..planes.weights import whole_number
from .plan import Plan

Chosen = TypeVar("Chosen", bound=int | Plan)


def parse_bits_or_plans(text: str) -> tuple[int | Plan, ...]:
    """`2,3`, `plan.json` or a mix: bits ascending, then plans as they are given.

    A part that ends in .json is a plan's file; where two would have one name, the plan is called as its file is given.
    Raises UsageError for bits, PlanError for a plan that cannot be used.
    """
    parts = [part.strip() for part in str(text).split(",")]
    files = [part for part in parts if part.endswith(".json")]
    numbers = [part for part in parts if not part.endswith(".json")]
    plans = [Plan.load(file) for file in files]
    bits = parse_bits(",".join(numbers)) if numbers or not plans else ()
    names = Counter(map(str, (*bits, *plans)))
    named = (
        replace(plan, name=file) if names[plan.name] > 1 else plan for plan, file in zip(plans, files, strict=True)
    )
    return (*bits, *named)


def parse_bits_or_plan(text: str) -> int | Plan:
    """One number of bits or one plan. Whether a model has these bits is for the model to say."""
    if text.strip().isdigit():
        return int(text)
    found = parse_bits_or_plans(text)
    if len(found) > 1:
        raise UsageError(f"bits {text!r} are several, one is needed", hint="give a number or a plan: 3, or plan.json")
    return found[0]


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
    return name, named if bits is None else as_whole(bits)


def check_plan_name(name: str, where: str, how: str) -> None:
    """Raise UsageError for a plan's name that a request to a server could not say; `how` says how to give another."""
    if not name or not name.isascii() or not name.isprintable() or name.isdigit() or set(name) & set(": /"):
        raise UsageError(
            f"{where}: a plan cannot be called {name!r}",
            hint=f"{how}, the name not a number and without spaces, colons and slashes",
        )


def highest_bits(bits: BitsOrPlan) -> int:
    """The number of planes that have to be there."""
    return bits if isinstance(bits, int) else max(bits.values())


def bits_name(bits: BitsOrPlan) -> int | str:
    """What results call it: a number, or the plan's name."""
    return bits if isinstance(bits, int) else str(bits)


def as_whole(value: Any) -> Any:
    """`value`, a whole number of NumPy or torch as an int."""
    whole = whole_number(value)
    return value if whole is None else whole
