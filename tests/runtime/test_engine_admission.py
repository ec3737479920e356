"""Who is admitted when: short requests pass long ones, long ones are not starved, and the cache is not hoarded."""

from __future__ import annotations

import threading

import pytest

from bitstrata.runtime import Engine, Finished, Request, Token
from bitstrata.runtime.batching import admission, continuation

WAIT = 120


class Log:
    """What comes of requests, in the order in which it comes."""

    def __init__(self):
        self.events, self.gate = [], threading.Event()

    def listener(self, name, *, held=False):
        """Notes the events of a request; the engine stands still at the first until `gate` is open, if held."""

        def note(event):
            self.events.append((name, event))
            if held:
                self.gate.wait(WAIT)

        return note

    def first(self, name):
        return next(index for index, (other, _) in enumerate(self.events) if other == name)

    def end(self, name):
        return next(i for i, (other, event) in enumerate(self.events) if other == name and isinstance(event, Finished))

    def tokens_before(self, name, end):
        return sum(other == name and isinstance(event, Token) for other, event in self.events[:end])


def wait_for_start(log):
    while not log.events:
        pass


def test_a_short_request_passes_a_long_one_for_which_there_is_no_room(model, code, alone):
    runs, long, short = (code[:32], 3, 97), (code[50:150], 2, 101), (code[200:210], 4, 4)
    expected = [alone(*work) for work in (runs, long, short)]
    assert len(expected[0]) == 97
    log = Log()
    with Engine(model, max_requests=4, cache_tokens=256) as engine:
        handles = []
        for name, (prompt, bits, new) in (("runs", runs), ("long", long), ("short", short)):
            request = Request(prompt, bits=bits, max_new_tokens=new)
            handles.append(engine.submit(request, log.listener(name, held=name == "runs")))
            wait_for_start(log)
        log.gate.set()
        assert [handle.result(WAIT) for handle in handles] == expected
    assert log.end("short") < log.end("runs") < log.first("long")


def test_a_long_request_is_passed_so_many_times_and_not_more(model, code):
    log = Log()
    shorts = range(3 * admission.OVERTAKEN)
    with Engine(model, max_requests=4, cache_tokens=256) as engine:
        engine.submit(Request(code[:32], max_new_tokens=97, ignore_eos=True), log.listener("runs", held=True))
        wait_for_start(log)
        engine.submit(Request(code[50:150], max_new_tokens=101, ignore_eos=True), log.listener("long"))
        for number in shorts:
            engine.submit(Request(code[200:210], max_new_tokens=2, ignore_eos=True), log.listener(number))
        log.gate.set()
    started = log.first("long")
    assert sum(log.end(number) < started for number in shorts) == admission.OVERTAKEN
    assert len(log.events) == 98 + 102 + 3 * len(shorts), "everyone was served"


@pytest.mark.parametrize("cache", [256, 352])
@pytest.mark.parametrize("limited", [True, False])
def test_the_older_request_takes_room_from_the_younger(model, code, alone, monkeypatch, cache, limited):
    """With room for both, the older one moves to where it is; what each says stays its own."""
    monkeypatch.setattr(continuation, "GROWTH", 32)
    endless, neighbour = (code[:20], 3, 200), (code[100:110], 2, 100)
    expected = [alone(*endless), alone(*neighbour)]
    assert [len(tokens) for tokens in expected] == [200, 100]
    log = Log()
    with Engine(model, max_requests=4, cache_tokens=cache) as engine:
        request = Request(endless[0], bits=endless[1], max_new_tokens=endless[2] if limited else None)
        first = engine.submit(request, log.listener("endless", held=True))
        wait_for_start(log)
        request = Request(neighbour[0], bits=neighbour[1], max_new_tokens=neighbour[2])
        second = engine.submit(request, log.listener("neighbour"))
        log.gate.set()
        assert second.result(WAIT) == expected[1]
        assert first.result(WAIT)[:200] == expected[0]
        assert (engine.stats().set_back > 0) == (cache == 256)
        assert engine.stats().prompt_tokens == 30, "counted once"
    if cache == 352:
        assert abs(log.tokens_before("endless", log.end("neighbour")) - neighbour[2]) < 4
    elif limited:
        assert log.end("endless") < log.end("neighbour")


def test_a_limit_reserves_nothing(model, code, alone):
    """Clients that always ask for thousands of tokens run beside each other, and leave room for the others."""
    work = [(code[10 * start : 10 * start + 10], 2 + start % 3) for start in range(4)]
    stops = [alone(prompt, bits, 12)[-1] for prompt, bits in work]
    log, together = Log(), []
    with Engine(model, max_requests=4, cache_tokens=4 * (10 + continuation.GROWTH) + 64) as engine:
        handles = []
        for number, ((prompt, bits), stop) in enumerate(zip(work, stops, strict=True)):
            note = log.listener(number, held=number == 0)
            request = Request(prompt, bits=bits, max_new_tokens=400, stop=[stop])
            handles.append(
                engine.submit(request, lambda event, note=note: (together.append(engine.stats().running), note(event)))
            )
            wait_for_start(log)
        log.gate.set()
        made = [handle.result(WAIT) for handle in handles]
        assert engine.stats().set_back == 0
    assert max(together) == 4
    for (prompt, bits), tokens, stop in zip(work, made, stops, strict=True):
        assert tokens == alone(prompt, bits, len(tokens))
        assert tokens[-1] == stop


def test_requests_without_a_limit_share_the_cache(model, code, alone, monkeypatch):
    """Each has all of it in the end, in the order in which they came."""
    monkeypatch.setattr(continuation, "GROWTH", 32)
    prompts = [(code[start : start + 20], bits) for start, bits in ((0, 2), (100, 3), (200, 4))]
    most = 256 + 1 - 20
    log = Log()
    with Engine(model, max_requests=4, cache_tokens=256) as engine:
        handles = []
        for number, (prompt, bits) in enumerate(prompts):
            request = Request(prompt, bits=bits, max_new_tokens=None, ignore_eos=True)
            handles.append(engine.submit(request, log.listener(number)))
        made = [handle.result(WAIT) for handle in handles]
        assert [handle.finished for handle in handles] == [Finished("length")] * 3
        assert engine.stats().cache_used_tokens == 0
        assert engine.stats().set_back >= 2
    for (prompt, bits), tokens in zip(prompts, made, strict=True):
        expected = alone(prompt, bits, len(tokens))
        assert tokens[: len(expected)] == expected
        assert len(tokens) == most
    assert log.end(0) < log.end(1) < log.end(2)
    assert log.first(2) < log.end(0), "they ran together"


@pytest.mark.parametrize("reuse", ["equal", "off"])
def test_a_request_that_is_set_back_says_nothing_twice(model, code, monkeypatch, reuse):
    """Sampled with log-probabilities of all: the same events as alone, though parts were computed anew."""
    monkeypatch.setattr(continuation, "GROWTH", 16)
    requests = [
        Request(
            code[60 * n : 60 * n + 30],
            bits=2 + n,
            max_new_tokens=120,
            seed=n,
            temperature=0.9,
            logprobs=2,
            prompt_logprobs=2,
            ignore_eos=True,
        )
        for n in range(3)
    ]

    def events(engine, requests):
        logs = [[] for _ in requests]
        for handle in [engine.submit(one, log.append) for one, log in zip(requests, logs, strict=True)]:
            handle.result(WAIT)
        return logs

    with Engine(model, max_requests=1, cache_tokens=256, reuse="off") as engine:
        expected = events(engine, requests)
        assert engine.stats().set_back == 0
    with Engine(model, max_requests=4, cache_tokens=256, reuse=reuse) as engine:
        found = events(engine, requests)
        assert engine.stats().set_back > 0
    for own, other in zip(found, expected, strict=True):
        assert [type(event) for event in own] == [type(event) for event in other]
        assert [event.id for event in own if isinstance(event, Token)] == [e.id for e in other if isinstance(e, Token)]
        pairs = [(e, o) for e, o in zip(own, other, strict=True) if isinstance(e, Token)]
        assert [e.logprob for e, _ in pairs] == pytest.approx([o.logprob for _, o in pairs], abs=1e-4)


def test_one_that_was_set_back_is_cancelled_like_any_other(model, code, monkeypatch):
    monkeypatch.setattr(continuation, "GROWTH", 16)
    with Engine(model, max_requests=4, cache_tokens=128) as engine:
        old = engine.submit(Request(code[:20], max_new_tokens=100, ignore_eos=True))
        young = engine.submit(Request(code[50:70], max_new_tokens=100, ignore_eos=True))
        while not engine.stats().set_back:
            pass
        young.cancel()
        assert len(old.result(WAIT)) == 100
        young.result(WAIT)
        assert young.finished == Finished("cancelled")
        assert engine.stats().cache_used_tokens == 0
