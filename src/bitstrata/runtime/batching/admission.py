"""Who gets room in the cache, and when.

A request that says how many tokens it makes gets room for all of them before it starts. One that does not say gets
GROWTH more at a time, as it goes.

First come, first served, but a request for which there is no room now lets smaller ones pass, OVERTAKEN of them in all.
Then none passes it any more, so that its room comes free.

A request that cannot grow waits, and until it can none is admitted. If all that run wait for that, nothing will come
free by itself: the longest of them then ends, as at any other limit. None of n such requests ends before it had an n-th
of the cache, rounded down by GROWTH.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ...nn import Assignment
from ..policy import RequestPolicy
from .continuation import Continuation
from .prefixes import Prefixes
from .request import Handle

OVERTAKEN = 32  # times that a request lets another pass


@dataclass(eq=False, kw_only=True)
class Running(Continuation):
    """A request between submit and its end."""

    handle: Handle
    policy: RequestPolicy
    entropy: float | None = None  # of the last distribution, if the policy wants it
    overtaken: int = 0


def admit(
    waiting: Mapping[int, Running],
    prefixes: Prefixes,
    places: int,
    running: Collection[Running],
    bits_of: Callable[[Running], Assignment],
) -> Iterator[Running]:
    """Reserve room for up to `places` of those that wait, in their order; each is to be taken from `waiting`.

    running: those that run, which may have computed the beginning of one that waits. bits_of: at what one would begin.
    """
    passed: list[Running] = []
    for item in list(waiting.values()):
        if not places or (passed and passed[0].overtaken >= OVERTAKEN):  # the first was overtaken most often
            return
        if not prefixes.claim(item, bits_of(item), running):
            passed.append(item)
            continue
        for other in passed:
            other.overtaken += 1
        places -= 1
        yield item


def grow(running: Iterable[Running], prefixes: Prefixes) -> list[Running]:
    """Get room for the next token of all that have used theirs up; those for which there is none."""
    stalled = []
    for item in running:
        if item.place is None or not item.lacks_room():
            continue
        larger = prefixes.grow(item.place, item.past, item.room)
        if larger is None:
            stalled.append(item)
        else:
            item.place = larger
    return stalled
