"""Bits and plans from what a user types."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from ..checkpoint import Plan
from ..errors import UsageError
from ..nn import Precision, parse_bits


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


def highest_bits(bits: Precision) -> int:
    """The number of planes that have to be there."""
    return bits if isinstance(bits, int) else max(bits.values())


def bits_name(bits: Precision) -> int | str:
    """What results call it: a number, or the plan's name."""
    return bits if isinstance(bits, int) else str(bits)
