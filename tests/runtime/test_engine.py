"""The engine: tokens of each request as alone, requests do not disturb each other, nothing is left behind."""

from __future__ import annotations

import random
import threading

import pytest
import torch

import bitstrata
from bitstrata.errors import BitstrataError, InputError, ResourceError, UnsupportedBitsError, UsageError
from bitstrata.nn import steady_rows
from bitstrata.runtime import Engine, Finished, Request, Token

WAIT = 120  # seconds for one event before a test gives up; no test measures time


def some_requests(code, seed, count, lengths, most=40):
    """`count` requests: (prompt, bits, new tokens)."""
    chance = random.Random(seed)
    made = []
    for _ in range(count):
        length = chance.choice(lengths)
        start = chance.randrange(len(code) - length)
        made.append((code[start : start + length], chance.choice((2, 3, 4)), chance.randrange(1, most)))
    return made


def submit(engine, requests):
    return [engine.submit(Request(prompt, bits=bits, max_new_tokens=new)) for prompt, bits, new in requests]


def is_empty(engine):
    stats = engine.stats()
    return (stats.running, stats.waiting, stats.cache_used_tokens) == (0, 0, 0)


NEAR = 0.05  # of logits: what one activation rounded to the other of two bytes moves them by (their deviation is 3)


def is_near_tie(model, prompt, bits, expected, found):
    """Whether the first token in which two continuations differ was all but as likely as the other."""
    at = next((at for at, (one, two) in enumerate(zip(expected, found, strict=False)) if one != two), None)
    if at is None:  # one of them ended early
        return False
    with torch.no_grad():  # as `generate` goes: the prompt, then one token at a time
        output = model(torch.tensor([prompt]), bits=bits, use_cache=True)
        for token in expected[:at]:
            output = model(torch.tensor([[token]]), bits=bits, past_key_values=output.past_key_values, use_cache=True)
    logits = output.logits[0, -1]
    return float(logits[expected[at]] - logits[found[at]]) < NEAR


def test_every_request_of_a_mixed_batch_gets_the_tokens_it_gets_alone(model, tokenizer, code, alone, seed):
    steady = steady_rows(model, torch.float32) or 16
    lengths = [1, 2, steady - 1, steady, steady + 1, 2 * steady + 1, 50, 90]  # kernels change at `steady` rows
    requests = some_requests(code, seed, 24, lengths)
    expected = [alone(*request) for request in requests]
    made, differing = 0, []
    with Engine(model, tokenizer, max_requests=20, max_batch_tokens=2 * steady + 9) as engine:
        handles = submit(engine, requests)
        for handle, (prompt, bits, _), tokens in zip(handles, requests, expected, strict=True):
            events = list(handle.events(WAIT))
            found = [event.id for event in events[:-1]]
            if found != tokens:  # sums of torch's own products may come in another order in a batch
                differing.append((prompt, bits, tokens, found))
            made += len(found)
            assert {event.bits for event in events[:-1]} == {bits}
            ended = found[-1] == model.generation_config.eos_token_id
            assert events[-1] == Finished("stop" if ended else "length")
        stats = engine.stats()
    assert len(differing) <= 2
    assert all(is_near_tie(model, *difference) for difference in differing)
    assert stats.new_tokens == made
    assert stats.prompt_tokens == sum(len(prompt) for prompt, _, _ in requests)
    assert stats.batches < stats.new_tokens / 2, "requests did not share batches"


def test_requests_that_wait_for_room_in_the_cache_get_their_turn(model, code, alone, seed):
    requests = some_requests(code, seed, 10, [30, 60, 90])
    expected = [alone(*request) for request in requests]
    with Engine(model, max_requests=4, cache_tokens=256) as engine:
        handles = submit(engine, requests)
        assert [handle.result(WAIT) for handle in handles] == expected
        assert is_empty(engine)


def test_a_cancelled_request_ends_and_frees_its_cache_while_others_go_on(model, code, alone):
    kept = (code[:30], 3, 60)
    expected = alone(*kept)
    with Engine(model, max_requests=2) as engine:
        (other,) = submit(engine, [kept])
        handle = engine.submit(Request(code[100:150], bits=2, max_new_tokens=300, ignore_eos=True))
        never_ran = engine.submit(Request(code[200:250], bits=2, max_new_tokens=300))
        never_ran.cancel()
        events = handle.events(WAIT)
        assert isinstance(next(events), Token)
        handle.cancel()
        handle.cancel()
        assert list(events)[-1] == Finished("cancelled")
        assert len(handle.tokens) < 300
        assert list(never_ran.events(WAIT)) == [Finished("cancelled")]
        assert other.result(WAIT) == expected
        assert is_empty(engine)
        assert engine.stats().finished == {"stop": 0, "length": 1, "cancelled": 2, "error": 0}


def test_the_cache_has_a_fixed_size_and_is_empty_after_all_is_done(model, code, seed):
    with Engine(model, max_requests=6, cache_tokens=1024) as engine:
        before = engine.stats()
        for turn in range(3):
            for handle in submit(engine, some_requests(code, seed + turn, 8, [5, 40, 80])):
                handle.result(WAIT)
            assert is_empty(engine)
            assert engine.stats().cache_bytes == before.cache_bytes > 0
        assert engine.stats().cache_tokens == 1024
    assert engine.stats().cache_bytes == 0


def test_bits_can_change_between_two_tokens(model, code, alone):
    prompt = code[:40]
    changed = threading.Event()

    def change(event):
        if isinstance(event, Token) and not changed.is_set():
            changed.wait(WAIT)

    with Engine(model) as engine:
        handle = engine.submit(Request(prompt, bits=4, max_new_tokens=12, ignore_eos=True), listener=change)
        handle.set_bits(2)
        with pytest.raises(UnsupportedBitsError):
            handle.set_bits(7)
        changed.set()
        used = [event.bits for event in handle.events(WAIT) if isinstance(event, Token)]
    assert used[-1] == 2 == handle.bits
    assert used == sorted(used, reverse=True)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"bits": 5}, UnsupportedBitsError, "bits=5"),
        ({"bits": True}, UnsupportedBitsError, "True"),
        ({"min_bits": 1}, UnsupportedBitsError, "bits=1"),
        ({"bits": 2, "min_bits": 3}, UsageError, "min_bits=3 is above"),
        ({"prompt_ids": []}, InputError, "empty"),
        ({"prompt_ids": [1, -1]}, InputError, "-1 is not a token"),
        ({"prompt_ids": [4096]}, InputError, "4096 is not a token"),
        ({"prompt_ids": [1.5]}, InputError, "1.5 is not a token"),
        ({"prompt_ids": [1] * 1024}, InputError, "context, 1024"),
        ({"prompt_ids": [1] * 1000, "max_new_tokens": 25}, InputError, "max_new_tokens=25"),
        ({"max_new_tokens": 0}, UsageError, "max_new_tokens=0"),
        ({"temperature": -1.0}, UsageError, "temperature=-1.0"),
        ({"temperature": float("nan")}, UsageError, "temperature=nan"),
        ({"temperature": float("inf")}, UsageError, "temperature=inf"),
        ({"top_p": 0.0}, UsageError, "top_p=0.0"),
        ({"top_p": 1.1}, UsageError, "top_p=1.1"),
        ({"logprobs": -1}, UsageError, "logprobs=-1"),
        ({"stop": "end"}, UsageError, "sequence"),
        ({"stop": [""]}, UsageError, "empty stop"),
        ({"stop": ["end"]}, UsageError, "tokenizer"),
    ],
    ids=str,
)
def test_wrong_requests_are_refused_by_name_and_disturb_nobody(shared, code, settings, error, message):
    with pytest.raises(error, match=message):
        shared.submit(Request(**{"prompt_ids": code[:5], **settings}))
    assert isinstance(error("x", ()) if error is UnsupportedBitsError else error("x"), BitstrataError)
    assert len(shared.submit(Request(code[:5], max_new_tokens=2, ignore_eos=True)).result(WAIT)) == 2


@pytest.fixture(scope="module")
def shared(bundled):
    """One engine for the tests that leave it as it was, on a model of its own: it holds that one all the while."""
    with Engine(bitstrata.load(bundled, dtype=torch.float32), cache_tokens=2048) as engine:
        yield engine


def test_a_prompt_longer_than_the_cache_and_a_full_queue_are_refused(bundled, code):
    other = bitstrata.load(bundled, dtype=torch.float32)
    gate = threading.Event()
    with Engine(other, max_requests=1, max_waiting=1, cache_tokens=64) as engine:
        with pytest.raises(InputError, match="cache, 65"):
            engine.submit(Request(code[:65]))
        assert engine.submit(Request(code[:30], max_new_tokens=None, ignore_eos=True)).result(WAIT)[34:] != []
        first = engine.submit(Request(code[:5], max_new_tokens=3), listener=lambda _: gate.wait(WAIT) and None)
        while engine.stats().running == 0:
            pass
        second = engine.submit(Request(code[:5], max_new_tokens=3))
        with pytest.raises(ResourceError, match="waiting already"):
            engine.submit(Request(code[:5], max_new_tokens=3))
        gate.set()
        assert first.result(WAIT) == second.result(WAIT)


def test_a_batch_that_fails_ends_its_requests_and_the_engine_goes_on(shared, code, alone, monkeypatch):
    run, failing = shared._forward.run, [True]

    def fail(*arguments):
        if failing:
            failing.pop()
            raise torch.OutOfMemoryError("out of memory, for this test")
        return run(*arguments)

    monkeypatch.setattr(shared._forward, "run", fail)
    handle = shared.submit(Request(code[:20], max_new_tokens=4))
    with pytest.raises(torch.OutOfMemoryError):
        handle.result(WAIT)
    assert handle.finished.reason == "error"
    assert len(shared.submit(Request(code[:20], max_new_tokens=4, ignore_eos=True)).result(WAIT)) == 4
    assert is_empty(shared)


def test_a_listener_that_raises_ends_its_own_request_only(shared, code):
    def raises(event):
        raise ValueError("the listener's own")

    broken = shared.submit(Request(code[:20], max_new_tokens=50, ignore_eos=True), listener=raises)
    sound = shared.submit(Request(code[:20], max_new_tokens=20, ignore_eos=True))
    assert len(sound.result(WAIT)) == 20
    with pytest.raises(ValueError, match="listener's own"):
        broken.result(WAIT)
    assert len(broken.tokens) < 50


def test_stop_texts_and_tokens_end_a_request(model, tokenizer, code):
    with Engine(model, tokenizer) as engine:
        plain = Request(code[:40], bits=4, max_new_tokens=40, ignore_eos=True)
        tokens = engine.submit(plain).result(WAIT)
        text = tokenizer.decode(tokens)
        word = text[10:15]
        cut = engine.submit(Request(code[:40], bits=4, max_new_tokens=40, stop=[word], ignore_eos=True))
        kept = cut.result(WAIT)
        assert cut.finished == Finished("stop")
        assert kept == tokens[: len(kept)]
        assert word in tokenizer.decode(kept)
        assert word not in tokenizer.decode(kept[:-1])
        by_id = engine.submit(Request(code[:40], bits=4, max_new_tokens=40, stop=[tokens[7]], ignore_eos=True))
        assert by_id.result(WAIT) == tokens[: tokens.index(tokens[7]) + 1]


def test_log_probabilities_are_those_of_the_model(shared, bundled, code):
    events = list(shared.submit(Request(code[:20], bits=3, max_new_tokens=6, logprobs=3)).events(WAIT))
    tokens = [event for event in events if isinstance(event, Token)]
    exact = bitstrata.load(bundled, dtype=torch.float32)
    ids = list(code[:20])
    for event in tokens:
        with torch.no_grad():
            expected = exact(torch.tensor([ids]), bits=3).logits[0, -1].log_softmax(-1)
        assert event.logprob == pytest.approx(float(expected[event.id]), abs=0.1)  # one row in int8, many rows not
        assert event.top[0] == (event.id, event.logprob)
        assert [value for _, value in event.top] == sorted((value for _, value in event.top), reverse=True)
        assert len(event.top) == 3
        ids.append(event.id)


def test_requests_may_come_from_many_threads(model, code, alone, seed):
    requests = some_requests(code, seed, 16, [3, 20, 40], most=15)
    expected = [alone(*request) for request in requests]
    results: list = [None] * len(requests)
    with Engine(model, max_requests=8) as engine:

        def ask(index):
            results[index] = submit(engine, [requests[index]])[0].result(WAIT)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        assert is_empty(engine)
    assert results == expected
