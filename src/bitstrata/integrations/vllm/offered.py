"""What a server offers: the bits and plans that requests may ask for, and what is wrong with others.

A server checks requests in one process and runs them in another. In the one, vLLM hands a request's parameters to a
class, not to an object, so what is offered has to be known to the process: vLLM serves one model a process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import UnsupportedBitsError, UsageError

BITS, PLAN, MIN_BITS = "bits", "plan", "min_bits"  # of vllm_xargs
Choice = int | str  # bits, or the name of a plan
_served: list[Offered] = []


@dataclass(frozen=True)
class Asked:
    """What a request asks for. Only a policy lowers it, to `min_bits` at the least; None is never lowered."""

    choice: Choice
    min_bits: int | None = None


@dataclass(frozen=True)
class Offered:
    """What requests may ask for.

    Args:
        bits: ascending.
        default: of requests that ask for nothing; one of `bits`, or the name of a plan.
        plans: the bits of every layer, by the plan's name.
        min_bits: of requests that do not say how far they may be lowered; one of `bits`.

    Raises UsageError for a default or a `min_bits` that is not offered.
    """

    bits: tuple[int, ...]
    default: Choice
    plans: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    min_bits: int | None = None

    def __post_init__(self) -> None:
        self._check(self.default)
        if self.min_bits is not None:
            self._check_min_bits(self.min_bits)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All that a request can ask for; its place among them is what goes to the rows."""
        return (*self.bits, *self.plans)

    def place(self, choice: Choice) -> int:
        return self.choices.index(choice)

    def of_request(self, extra: Mapping[str, Any] | None) -> Asked:
        """What a request with these extra arguments asks for; raises UsageError for what is not offered."""
        extra = extra or {}
        given = [(key, extra[key]) for key in (BITS, PLAN) if extra.get(key) is not None]
        for key, value in given:
            self._check(value, key)
        if len({value for _, value in given}) > 1:
            raise UsageError(f"bits says {given[0][1]} and plan says {given[1][1]}", hint="give one of them")
        choice = given[0][1] if given else self.default
        return Asked(choice, self._least(choice, extra.get(MIN_BITS)))

    def _least(self, choice: Choice, asked: Any) -> int | None:
        if asked is None:
            return None if self.min_bits is None or isinstance(choice, str) else min(self.min_bits, choice)
        least = self._check_min_bits(asked)
        if isinstance(choice, str):
            raise UsageError(f"min_bits={asked} cannot go with a plan", hint="policies lower bits that are a number")
        if least > choice:
            raise UsageError(f"min_bits={asked} is above bits={choice}", hint=self._supported)
        return least

    def _check_min_bits(self, asked: Any) -> int:
        if not isinstance(asked, int) or isinstance(asked, bool) or asked not in self.bits:
            raise UsageError(f"min_bits={asked!r} is not available in this server", hint=self._supported)
        return asked

    def _check(self, asked: Any, key: str = BITS) -> None:
        if isinstance(asked, list) and len(asked) > 1:
            raise UsageError(f"{key} is given as {' and as '.join(map(str, asked))}; give one", hint=self._supported)
        named = isinstance(asked, str) and not asked.isdigit()
        if isinstance(asked, bool) or not (isinstance(asked, str) if key == PLAN else isinstance(asked, int) or named):
            wanted = "the name of a plan" if key == PLAN else "a whole number, or the name of a plan"
            raise UsageError(f"{key} must be {wanted}, got {asked!r}", hint=self._supported)
        if isinstance(asked, str) and asked not in self.plans:
            raise UsageError(f"there is no plan {asked!r} in this server", hint=self._supported)
        if isinstance(asked, int) and asked not in self.bits:
            error = UnsupportedBitsError(asked, self.bits, where="this server")
            error.hint = self._supported
            raise error

    @property
    def _supported(self) -> str:
        plans = f"; plans: {', '.join(self.plans)}" if self.plans else ""
        return f"supported bits: {', '.join(map(str, self.bits))}{plans}"


def serve(offered: Offered) -> None:
    """This process serves a model that offers this."""
    _served[:] = [offered]


def served() -> Offered:
    """What the model of this process offers; UsageError if it is none of ours."""
    if not _served:
        raise UsageError("the model of this server is no bitstrata checkpoint: its bits cannot be chosen")
    return _served[0]
