"""Who is admitted when: short requests pass long ones, long ones are not starved, and no limit is no hoarding."""

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


@pytest.mark.parametrize(("cache", "waits"), [(256, True), (352, False)])
def test_a_request_without_a_limit_leaves_room_for_others(model, code, alone, monkeypatch, cache, waits):
    """It grows by waiting for its neighbour to end, or by moving to where there is room; its tokens stay its own."""
    monkeypatch.setattr(continuation, "GROWTH", 32)
    endless, neighbour = (code[:20], 3, 200), (code[100:110], 2, 100)
    expected = [alone(*endless), alone(*neighbour)]
    assert [len(tokens) for tokens in expected] == [200, 100]
    log = Log()
    with Engine(model, max_requests=4, cache_tokens=cache) as engine:
        request = Request(endless[0], bits=endless[1], max_new_tokens=None)
        first = engine.submit(request, log.listener("endless", held=True))
        wait_for_start(log)
        request = Request(neighbour[0], bits=neighbour[1], max_new_tokens=neighbour[2])
        second = engine.submit(request, log.listener("neighbour"))
        log.gate.set()
        assert second.result(WAIT) == expected[1]
        assert first.result(WAIT)[:200] == expected[0]
    had = log.tokens_before("endless", log.end("neighbour"))
    room = 64 - len(endless[0]) + 1  # 20 + 32 tokens in whole blocks; the last one needs none
    assert had == room if waits else abs(had - neighbour[2]) < 4


def test_requests_without_a_limit_share_the_cache(model, code, alone, monkeypatch):
    monkeypatch.setattr(continuation, "GROWTH", 32)
    prompts = [(code[start : start + 20], bits) for start, bits in ((0, 2), (100, 3), (200, 4))]
    most = 256 + 1 - 20
    with Engine(model, max_requests=4, cache_tokens=256) as engine:
        handles = [
            engine.submit(Request(prompt, bits=bits, max_new_tokens=None, ignore_eos=True)) for prompt, bits in prompts
        ]
        made = [handle.result(WAIT) for handle in handles]
        assert [handle.finished for handle in handles] == [Finished("length")] * 3
        assert engine.stats().cache_used_tokens == 0
    for (prompt, bits), tokens in zip(prompts, made, strict=True):
        expected = alone(prompt, bits, len(tokens))
        assert tokens[: len(expected)] == expected
        assert len(tokens) >= 256 // 3 - 20 - 32
    assert max(map(len, made)) == most, "the last one has all of it"
    assert min(map(len, made)) < most, "they ran together"
