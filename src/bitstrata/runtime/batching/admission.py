"""Who gets room in the cache, and when.

A request gets room for its prompt and GROWTH new tokens before it starts, and GROWTH more at a time as it goes,
whatever number of tokens it may make: most end long before.

First come, first served, but a request for which there is no room now lets smaller ones pass, OVERTAKEN of them in all.
Then none passes it any more, so that its room comes free.

A running request for which there is no more room takes it from the youngest: that one is set back. It waits again,
before all that came after it, and what it has made so far is then computed as a part of its prompt. The youngest itself
keeps what it has and waits for the others; meanwhile none is admitted. So the oldest always goes on, and alone it has
room for all that it may make.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ...nn import Assignment
from .continuation import Continuation
from .lowering import Lowering
from .prefixes import Prefixes
from .request import Handle

OVERTAKEN = 32  # times that a request lets another pass


@dataclass(eq=False, kw_only=True)
class Running(Continuation):
    """A request between submit and its end."""

    handle: Handle
    lowering: Lowering
    overtaken: int = 0
    set_back: int = 0  # times

    def wait_again(self) -> None:
        """It has left the cache, and begins anew, with what it made as a part of its prompt."""
        self.written, self.scored = [], []
        self.set_back += 1


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


def grow(running: Iterable[Running], prefixes: Prefixes) -> tuple[list[Running], list[Running]]:
    """Get room for the next token of all that have used theirs up.

    Returns those for which there is none now, and those that were set back.
    """
    stalled, back = [], []
    younger = sorted(running, key=lambda item: item.handle.number)
    while younger:
        item = younger.pop(0)
        if item.place is None or not item.lacks_room():
            continue
        while (larger := prefixes.grow(item.place, item.past, item.room)) is None and younger:
            last = younger.pop()
            prefixes.keep(last)
            last.wait_again()
            back.append(last)
        if larger is None:
            stalled.append(item)
        else:
            item.place = larger
    return stalled, back
