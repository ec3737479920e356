"""Which tokens go through the model together.

A kernel may compute calls of up to `steady` rows in one way and longer ones in another (the CPU's exact ones: from the
planes, and through tiles of the decoded weight). A request must not notice with whom it shares a batch, so a batch
holds either segments of at most `steady` tokens, together at most `steady`, or only segments that are longer: then
every row is computed as if its request were alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...nn import Assignment


@dataclass(frozen=True)
class Segment:
    """What request `owner` feeds: `length` tokens at `bits`, after the `past` ones that the cache holds.

    Its last token while it decodes, its prompt or a part of it before. is_last: whether it is given a token for them.
    every: whether logits after every token are wanted, and not only after the last.
    """

    owner: int
    past: int
    length: int
    bits: Assignment
    is_last: bool = True
    every: bool = False


def pack(
    waiting: Sequence[Segment], max_tokens: int, steady: int | None, stretch: int | None = None
) -> list[list[Segment]]:
    """The batches of one round: every short segment, and up to `max_tokens` tokens of long ones, oldest first.

    Of tokens with logits after every one a batch has at most `stretch`, which is enough for one long segment.
    Long segments are cut where max_tokens ends, but neither the piece nor what is left of it gets as short as
    `steady`. Without `steady` everything is in one batch, decoding requests first.
    """
    if steady is None:
        ordered = sorted(waiting, key=lambda item: item.length > 1)
        return [batch] if (batch := _fill(ordered, max_tokens, 0, max_tokens, stretch)) else []
    short = sorted((item for item in waiting if item.length <= steady), key=lambda item: _order(item.bits))
    batches: list[list[Segment]] = []
    rows = steady
    for item in short:  # in order of bits: a batch at one precision is faster than a mixed one
        if rows + item.length > steady:
            batches.append([])
            rows = 0
        batches[-1].append(item)
        rows += item.length
    long = _fill([item for item in waiting if item.length > steady], max_tokens, steady, steady, stretch)
    return [*batches, long] if long else batches


def _order(bits: Assignment) -> tuple[float, tuple[int, ...]]:
    """Equal bits lie together, a plan where its mean is."""
    choice = bits.choices[0]
    return sum(choice) / len(choice), choice


def _fill(items: Sequence[Segment], max_tokens: int, steady: int, most: int, stretch: int | None) -> list[Segment]:
    """At most `most` segments, of max_tokens tokens together: one row of each goes through the output head."""
    batch: list[Segment] = []
    left, every_left = max_tokens, max_tokens if stretch is None else stretch
    for item in items[:most]:
        room = min(left, every_left) if item.every else left
        length = item.length if item.length <= room else min(room, item.length - steady - 1)
        if length <= steady:
            if room < left:
                continue
            break
        batch.append(item if length == item.length else replace(item, length=length, is_last=False))
        left -= length
        every_left -= length * item.every
    return batch
