"""What ended texts left in the cache: found, taken up or copied, never wrong, and gone when its place is needed."""

from __future__ import annotations

import random
import threading
from itertools import pairwise

import pytest
import torch

import bitstrata
from bitstrata.errors import UsageError
from bitstrata.kernels.cpu.blocked import FEW_ROWS
from bitstrata.models import load_tokenizer
from bitstrata.nn import Assignment
from bitstrata.runtime import Conversation, Engine, Request, continue_tokens
from bitstrata.runtime.batching import Sampler
from bitstrata.runtime.batching.continuation import Continuation
from bitstrata.runtime.batching.memory import BLOCK, TokenPool
from bitstrata.runtime.batching.prefixes import Prefixes
from bitstrata.runtime.generation import GenerationSettings

WAIT = 120
LEAST = BLOCK  # tokens; less is not taken up
AT = {bits: Assignment(bits, ((bits,),)) for bits in (2, 3, 4)}
SAMPLER = Sampler(0.0, 1.0, random.Random(0))


def text(tokens, most=8):
    return Continuation(list(tokens), most, SAMPLER)


def write(pool, item, bits, count):
    """`item` computes `count` tokens more; what it writes says which tokens at which bits came before, and where."""
    first = item.past
    values = [float(hash((tuple(item.tokens[: place + 1]), bits)) % 99991) for place in range(first, first + count)]
    where = torch.arange(item.place.start + first, item.place.start + first + count)
    held = torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1)
    pool.write(0, where, held, -held)
    item.written += [AT[bits].choices[0]] * count
    return values


def test_whatever_happens_a_text_has_what_it_would_have_written_itself(seed):
    """Texts with common beginnings come, go on and end in a small pool; some have to move or to be forgotten."""
    chance = random.Random(seed)
    stems = [[chance.randrange(5) for _ in range(60)] for _ in range(3)]
    pool = TokenPool(512)
    prefixes = Prefixes(pool, None)
    live: list[tuple[Continuation, int, list[float]]] = []
    taken = refused = 0
    for _ in range(800):
        if live and chance.random() < 0.45:
            item, _, _ = live.pop(chance.randrange(len(live)))
            prefixes.keep(item)
        else:
            stem, bits = chance.choice(stems), chance.choice((2, 2, 3))
            tokens = stem[: chance.randrange(1, 60)] + [chance.randrange(5) for _ in range(chance.randrange(1, 40))]
            item = text(tokens)
            if not prefixes.claim(item, AT[bits], [other for other, _, _ in live]):
                refused += 1
                continue
            assert item.past == item.reused < len(tokens)
            assert item.past == 0 or item.past >= LEAST
            taken += item.past > 0
            held = pool.layer(0)[0][0, item.place.start : item.place.start + item.past, 0].tolist() if item.past else []
            expected = [float(hash((tuple(tokens[: at + 1]), bits)) % 99991) for at in range(item.past)]
            assert held == expected
            live.append((item, bits, expected + write(pool, item, bits, len(tokens) - item.past)))
        for item, _, values in live:
            assert pool.layer(0)[0][0, item.place.start : item.place.start + item.past, 0].tolist() == values
        ranges = sorted((item.place.start, item.place.stop) for item, _, _ in live)
        assert all(stop <= start for (_, stop), (start, _) in pairwise(ranges))
        assert pool.used_tokens == prefixes.tokens + sum(len(item.place) for item, _, _ in live)
    assert min(taken, refused) > 20
    for item, _, _ in live:
        prefixes.keep(item)
    prefixes.clear()
    assert pool.used_tokens == prefixes.tokens == 0


def ended(pool, prefixes, tokens, bits=4):
    item = text(tokens)
    assert prefixes.claim(item, AT[bits])
    write(pool, item, bits, len(tokens) - item.past)
    prefixes.keep(item)
    return item.reused


@pytest.mark.parametrize(("reuse", "same", "other"), [("equal", 39, 0), ("any", 39, 39), ("off", 0, 0)])
def test_which_bits_are_taken_up_is_a_setting(reuse, same, other):
    for bits, expected in ((4, same), (2, other)):
        pool = TokenPool(256)
        prefixes = Prefixes(pool, None, reuse)
        ended(pool, prefixes, range(40), 4)
        assert ended(pool, prefixes, range(40), bits) == expected
    with pytest.raises(UsageError, match="reuse='some'"):
        Prefixes(TokenPool(64), None, "some")


@pytest.mark.parametrize(("length", "expected"), [(10, 0), (17, 0), (33, 16), (100, 83)])
def test_many_rows_stay_many_rows(length, expected):
    """With kernels that compute up to 16 rows in another way, more than 16 are left of a prompt of more than 16."""
    pool = TokenPool(512)
    prefixes = Prefixes(pool, 16)
    ended(pool, prefixes, range(length))
    assert ended(pool, prefixes, range(length)) == expected


def test_the_one_of_use_longest_ago_goes_first():
    pool = TokenPool(5 * 32)
    prefixes = Prefixes(pool, None)
    first, second, third = ([stem] * 24 for stem in (1, 2, 3))
    for tokens in (first, second, third):
        assert ended(pool, prefixes, tokens) == 0
    assert ended(pool, prefixes, first) == 23
    assert ended(pool, prefixes, [9] * 80) == 0, "takes the place of the second"
    assert ended(pool, prefixes, first) == 23
    assert ended(pool, prefixes, second) == 0


def test_a_text_for_which_there_is_no_room_costs_nobody_anything():
    pool = TokenPool(160)
    prefixes = Prefixes(pool, None)
    live = text(range(50, 100))
    assert prefixes.claim(live, AT[4])
    ended(pool, prefixes, range(40))
    assert not prefixes.claim(text(range(120)), AT[4])
    assert ended(pool, prefixes, range(40)) == 39
    prefixes.keep(live)
    assert prefixes.claim(text(range(120)), AT[4]), "in the place of both"
    assert prefixes.tokens == 0


def test_a_copy_keeps_the_end_of_the_other_where_there_is_room():
    system = list(range(100, 140))
    one, other = system + [1] * 40, system + [2] * 40
    for size, kept in ((512, True), (112, False)):
        pool = TokenPool(size)
        prefixes = Prefixes(pool, None)
        ended(pool, prefixes, one)
        assert ended(pool, prefixes, other) == 40
        assert (ended(pool, prefixes, [*one, 5]) == 80) is kept


@pytest.mark.parametrize("reuse", ["equal", "off"])
def test_an_engine_makes_the_same_tokens_with_and_without(model, code, alone, reuse):
    system = code[:70]
    prompts = [(system + code[start : start + 20], bits) for start in (200, 300, 400, 200) for bits in (2, 4)]
    expected = [alone(prompt, bits, 12) for prompt, bits in prompts]
    with Engine(model, max_requests=3, cache_tokens=512, reuse=reuse) as engine:
        handles = []
        for _ in range(2):
            handles += [engine.submit(Request(prompt, bits=bits, max_new_tokens=12)) for prompt, bits in prompts]
        assert [handle.result(WAIT) for handle in handles] == expected * 2
        stats = engine.stats()
        assert stats.cache_used_tokens == 0
        if reuse == "off":
            assert stats.reused_tokens == stats.cache_kept_tokens == 0
        else:
            assert stats.reused_tokens == sum(handle.reused_tokens for handle in handles) > 10 * len(system)
            assert stats.cache_kept_tokens > 0
    with pytest.raises(UsageError, match="reuse"):
        Engine(model, reuse="never")


def test_a_request_that_still_runs_is_copied_from(model, code, alone):
    prompt, begun = code[:60], threading.Event()
    expected = [alone(prompt, 3, 100), alone(prompt + code[300:320], 3, 8)]
    with Engine(model, max_requests=2) as engine:
        first = engine.submit(Request(prompt, bits=3, max_new_tokens=100), lambda _: begun.set() and None)
        assert begun.wait(WAIT)
        second = engine.submit(Request(prompt + code[300:320], bits=3, max_new_tokens=8))
        assert [first.result(WAIT), second.result(WAIT)] == expected
        assert second.reused_tokens == 60


def test_what_a_policy_or_its_caller_lowered_is_known_by_the_bits_that_wrote_it(model, code, alone):
    prompt = code[:40]
    with Engine(model) as engine:
        request = Request(prompt, bits=4, max_new_tokens=12, ignore_eos=True)
        handle = engine.submit(request, lambda _: handle.set_bits(2))
        tokens = handle.result(WAIT)
        longer = prompt + tokens + code[80:100]
        again = engine.submit(Request(longer, bits=4, max_new_tokens=8))
        found = again.result(WAIT)
        assert 40 <= again.reused_tokens < 40 + 11, "up to where the bits changed"
    assert found == alone(longer, 4, 8)


@pytest.mark.parametrize("draft_bits", [None, 2])
def test_turns_of_a_chat(bundled, exact_kernel, draft_bits):
    model = bitstrata.load(bundled, dtype=torch.float32)
    tokenizer = load_tokenizer(bundled)
    settings = {"bits": 4, "max_new_tokens": 20, "draft_bits": draft_bits}
    talks = [Conversation(model, tokenizer, **settings, reuse=reuse) for reuse in ("equal", "off")]
    said = [
        "import os\n\n\ndef walk(top):\n    for name in os.",
        "\n    return [name for name in os.listdir(top) if not name]",
        "\n\n\nclass Walker:\n",
        "\ndef",
    ]
    reused = []
    for turn in said:
        replies = [talk.reply(turn) for talk in talks]
        assert replies[0].text == replies[1].text
        assert replies[1].reused_tokens == 0
        reused.append(replies[0].reused_tokens)
    assert reused[0] == 0
    assert reused[1:] == sorted(reused[1:])
    assert reused[1] > 20
    for talk in talks:
        talk.bits = 2
    replies = [talk.reply("\n") for talk in talks]
    assert replies[0].text == replies[1].text
    assert replies[0].reused_tokens == 0, "written at 4 bits"
    across = Conversation(model, tokenizer, bits=4, max_new_tokens=4, reuse="any")
    across.reply(said[0])
    across.bits = 3
    assert across.reply(said[1]).reused_tokens > 20


def test_a_model_that_was_resized_computes_anew(bundled, exact_kernel, tokenizer, code):
    model = bitstrata.load(bundled, plan=4, dtype=torch.float32)
    settings = GenerationSettings(12)

    def made():
        return continue_tokens(model, tokenizer, code[:60], "", bits=model.bits, settings=settings)

    four = made()
    assert made().reused_tokens == 60 - 1 - FEW_ROWS
    model.resize(2)
    two = made()
    assert two.reused_tokens == 0
    model.resize(4)
    again = made()
    assert again.text == four.text
    fresh = bitstrata.load(bundled, plan=2, dtype=torch.float32)
    assert two.text == continue_tokens(fresh, tokenizer, code[:60], "", bits=fresh.bits, settings=settings).text
