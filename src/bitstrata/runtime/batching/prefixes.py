"""What texts that ended left in the cache, for texts that begin in the same way.

An ended text's range stays in the pool, with its tokens and the bits that wrote each, until its place is needed: the
one that was of use longest ago goes first. Of a new text, the longest beginning that some text has in the cache,
written at the same bits, is not computed again. If that text has ended, the new one goes on in its place, unless the
old one's own end would be lost and there is free room for a copy; if it still runs, it is copied.

What is left to compute is at least one token. On kernels that compute few rows in another arithmetic than many, it is
more than few rows wherever the whole prompt is, so that a prompt is computed as it is without the cache. What the model
itself wrote is taken as it was written, a token at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...errors import UsageError
from ...nn import Assignment
from ...nn.bits import Choice
from .continuation import Continuation
from .memory import BLOCK, TokenPool

REUSE = ("equal", "any", "off")


def check_reuse(reuse: str) -> str:
    """`reuse` if it is one of REUSE; UsageError otherwise."""
    if reuse not in REUSE:
        raise UsageError(f"reuse={reuse!r} cannot be used", hint=f"give one of {', '.join(REUSE)}")
    return reuse


@dataclass(eq=False)
class _Kept:
    tokens: list[int]
    written: list[Choice]
    place: range


class Prefixes:
    """Room in `pool` for texts, and what ended ones left there. Not thread-safe.

    steady: rows up to which kernels compute as for one row; None if they always do. reuse: "equal" takes up what the
    same bits wrote, "any" what any bits wrote, "off" nothing.
    """

    def __init__(self, pool: TokenPool, steady: int | None, reuse: str = "equal") -> None:
        self._pool, self._steady, self.reuse = pool, steady, check_reuse(reuse)
        self._kept: list[_Kept] = []  # the one that was of use longest ago first

    @property
    def tokens(self) -> int:
        """Tokens of the pool in ranges that ended texts hold."""
        return sum(len(item.place) for item in self._kept)

    def claim(self, item: Continuation, bits: Assignment, running: Iterable[Continuation] = ()) -> bool:
        """Give `item`, which begins, a range with what is there of its tokens at `bits`; False if there is no room now.

        running: texts that still go on, to copy from.
        """
        if item.room > self._pool.longest(kept.place for kept in self._kept):  # before the texts are compared
            return False
        sources: list[_Kept | Continuation] = (
            [] if item.scores_next else [*self._kept, *running]
        )  # what is not computed has no logits
        source, common = self._longest(item.tokens, bits, sources)
        place = self._reserve(item.room) if source is None else self._place(source, common, item.room)
        if place is None:
            return False
        item.place = place
        if source is not None:
            item.written, item.reused = source.written[:common], common
        return True

    def grow(self, taken: range, used: int, tokens: int) -> range | None:
        """As TokenPool.grow, at the cost of what ended texts left."""
        while (larger := self._pool.grow(taken, used, tokens)) is None and self._kept:
            self._pool.release(self._kept.pop(0).place)
        return larger

    def keep(self, item: Continuation) -> None:
        """`item` has ended: what it has in the cache stays as long as nobody needs its place."""
        place, item.place = item.place, None
        if place is None:
            return
        if self.reuse == "off" or item.past < BLOCK or self._pool.kept_as == "nothing":
            self._pool.release(place)
            return
        shorter = self._pool.grow(place, item.past, item.past)
        assert shorter is not None
        self._kept.append(_Kept(item.tokens[: item.past], item.written, shorter))

    def clear(self) -> None:
        """Give back everything that ended texts hold."""
        for item in self._kept:
            self._pool.release(item.place)
        self._kept.clear()

    def _reserve(self, tokens: int) -> range | None:
        """As TokenPool.reserve, at the cost of what ended texts left."""
        while (place := self._pool.reserve(tokens)) is None and self._kept:
            self._pool.release(self._kept.pop(0).place)
        return place

    def _place(self, source: _Kept | Continuation, common: int, tokens: int) -> range | None:
        """A range of `tokens` that begins with the first `common` of `source`; None if there is none now."""
        place = None
        if isinstance(source, Continuation):
            place = self._reserve(tokens)
        else:
            self._kept.remove(source)
            self._kept.append(source)  # of use now
            if len(source.written) - common >= BLOCK:  # a shorter end that is lost is not worth a copy
                place = self._pool.reserve(tokens)
            if place is None:
                self._kept.remove(source)
                place = self.grow(source.place, common, tokens)
                if place is None:
                    self._kept.append(source)
                return place
        if place is not None:
            assert source.place is not None
            self._pool.copy(source.place, place, common)
        return place

    def _longest(
        self, tokens: Sequence[int], bits: Assignment, sources: Iterable[_Kept | Continuation]
    ) -> tuple[_Kept | Continuation | None, int]:
        """Which of `sources` has most of the beginning of `tokens` in the cache, and how many tokens of it to use."""
        most = len(tokens) - 1
        if self._steady is not None and len(tokens) > self._steady:
            most -= self._steady
        best, length = None, BLOCK - 1  # less is computed sooner than found
        whole = self._pool.kept_as == "whole"
        if self.reuse != "off" and most >= BLOCK and self._pool.kept_as != "nothing":
            choice = None if self.reuse == "any" else bits.choices[0]
            for source in sources:
                common = min(most, _common(tokens, choice, source))
                if whole and (isinstance(source, Continuation) or common < len(source.written)):
                    continue
                if common > length:
                    best, length = source, common
        return best, length


def _common(tokens: Sequence[int], choice: Choice | None, source: _Kept | Continuation) -> int:
    """How many of `tokens` are those of `source`, in the cache and, unless `choice` is None, written at `choice`."""
    for count, (token, other, wrote) in enumerate(zip(tokens, source.tokens, source.written, strict=False)):
        if token != other or not (choice is None or wrote is choice or wrote == choice):
            return count
    return min(len(tokens), len(source.written))
