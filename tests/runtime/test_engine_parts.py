"""The parts of the engine by themselves: which tokens go together, and where keys and values lie."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

import bitstrata
from bitstrata.nn import Assignment, bits_state
from bitstrata.runtime.batching.attention import Span
from bitstrata.runtime.batching.forward import Forward
from bitstrata.runtime.batching.memory import BLOCK, TokenPool
from bitstrata.runtime.batching.packing import Segment, pack


def test_packing_keeps_arithmetics_apart_and_feeds_everything_in_the_end(seed):
    chance = random.Random(seed)
    for steady in (None, 4, 16):
        least = 2 * (steady or 0) + 2
        for _ in range(50):
            max_tokens = chance.randrange(max(least, 12), 100)
            left = {owner: chance.choice([1, 1, chance.randrange(1, 150)]) for owner in range(12)}
            fed, rounds = dict.fromkeys(left, 0), 0
            total = dict(left)
            while any(left.values()):
                rounds += 1
                assert rounds < 1000, "no progress"
                waiting = [
                    Segment(owner, fed[owner], length, at(2 + owner % 3)) for owner, length in left.items() if length
                ]
                for batch in pack(waiting, max_tokens, steady):
                    check_batch(batch, max_tokens, steady, total)
                    for segment in batch:
                        assert segment.past == fed[segment.owner]
                        fed[segment.owner] += segment.length
                        left[segment.owner] -= segment.length
                        assert segment.is_last == (left[segment.owner] == 0)
            assert fed == total


def at(bits):
    """What a model of one layer makes of `bits`."""
    return Assignment(bits, ((bits,),))


def check_batch(batch, max_tokens, steady, total):
    lengths = [segment.length for segment in batch]
    owners = [segment.owner for segment in batch]
    assert len(set(owners)) == len(owners)
    assert min(lengths) > 0
    if steady is None:
        assert sum(lengths) <= max_tokens
        return
    assert len(batch) <= steady, "more rows at the output head than a row alone would tell"
    if sum(lengths) > steady:
        assert all(length > steady for length in lengths)
        assert sum(lengths) <= max_tokens
        assert all(total[owner] > steady for owner in owners)
    else:
        assert all(total[owner] <= steady for owner in owners), "the rest of a long prompt fell among the short ones"


def test_short_requests_of_equal_bits_come_together():
    waiting = [Segment(owner, 9, 1, at(bits)) for owner, bits in enumerate([2, 4, 2, 4, 2, 4])]
    assert [{part.bits.given for part in batch} for batch in pack(waiting, 10, 3)] == [{2}, {4}]


def test_ranges_never_overlap_and_come_back(seed):
    chance = random.Random(seed)
    pool = TokenPool(1000)
    assert pool.tokens % BLOCK == 0 <= pool.tokens - 1000 < BLOCK
    taken = []
    for _ in range(500):
        if taken and chance.random() < 0.5:
            pool.release(taken.pop(chance.randrange(len(taken))))
        elif (made := pool.reserve(chance.randrange(1, 200))) is not None:
            taken.append(made)
        ends = sorted((item.start, item.stop) for item in taken)
        assert all(stop <= start for (_, stop), (start, _) in pairwise(ends))
        assert pool.used_tokens == sum(item.stop - item.start for item in taken)
    for item in taken:
        pool.release(item)
    assert pool.used_tokens == 0
    assert pool.reserve(pool.tokens + 1) is None
    assert pool.reserve(pool.tokens) is not None


def test_ranges_that_grow_keep_what_they_hold(seed):
    chance = random.Random(seed)
    pool = TokenPool(600)
    moved = stayed = refused = 0
    held: list[tuple] = []  # range, the tokens written to it
    for _ in range(600):
        if len(held) > 6 or (held and chance.random() < 0.2):
            pool.release(held.pop(chance.randrange(len(held)))[0])
        elif held and chance.random() < 0.6:
            index = chance.randrange(len(held))
            taken, values = held[index]
            used = pool.used_tokens
            larger = pool.grow(taken, len(values), taken.stop - taken.start + chance.randrange(1, 100))
            if larger is None:
                refused += 1
                assert pool.used_tokens == used
            else:
                moved += larger.start != taken.start
                stayed += larger.start == taken.start
                held[index] = larger, values
        elif (made := pool.reserve(chance.randrange(1, 60))) is not None:
            values = torch.rand(chance.randrange(1, made.stop - made.start + 1))
            places = torch.arange(made.start, made.start + len(values))
            pool.write(0, places, values.reshape(1, -1, 1), -values.reshape(1, -1, 1))
            held.append((made, values))
        ends = sorted((item.start, item.stop) for item, _ in held)
        assert all(stop <= start for (_, stop), (start, _) in pairwise(ends))
        assert pool.used_tokens == sum(stop - start for start, stop in ends)
        nothing = torch.arange(0)
        keys, values_ = (side.tensors[0] for side in pool.write(0, nothing, *torch.empty(2, 1, 0, 1)))
        for item, values in held:
            assert torch.equal(keys[0, item.start : item.start + len(values), 0], values)
            assert torch.equal(values_[0, item.start : item.start + len(values), 0], -values)
    assert min(moved, stayed, refused) > 0, "all ways of growing were met"


@pytest.mark.parametrize("window", [None, 5, 100])
def test_gathered_attention_equals_one_request_after_the_other(bundled, code, window):
    """What a GPU runs for requests with one token each, with and without a sliding window."""
    model = bitstrata.load(bundled, dtype=torch.float32)
    for layer in model.model.layers:
        attach_window(layer.self_attn, window)
    pool, state = TokenPool(512), bits_state(model)
    one, together = Forward(model, pool, gather=False), Forward(model, pool, gather=True)
    with torch.no_grad():
        one.attach()
        prompts = [code[:7], code[50:70], code[90:91]]
        starts = [pool.reserve(64).start for _ in prompts]
        for prompt, start in zip(prompts, starts, strict=True):
            one.run([prompt], [Span(start, 0, len(prompt))], [state.resolve(4)])
        spans = [Span(start, len(prompt), 1) for prompt, start in zip(prompts, starts, strict=True)]
        step = ([[5], [6], [7]], spans, [state.resolve(bits) for bits in (2, 3, 4)])
        torch.testing.assert_close(together.run(*step), one.run(*step), rtol=1e-3, atol=2e-2)


def attach_window(attention, window):
    """Let an attention layer ask for a sliding window, as those of some architectures do."""
    plain = attention.forward
    attention.forward = lambda *args, **kwargs: plain(*args, sliding_window=window, **kwargs)
