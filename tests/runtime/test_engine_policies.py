"""Policies in the engine: whom they lower, and that tokens at bits which change are those of one request alone."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from switched import switching

from bitstrata.nn import steady_rows
from bitstrata.runtime import Engine, EntropyPolicy, LoadPolicy, Policy, PositionPolicy, Request, Token
from bitstrata.runtime.batching import lowering

WAIT = 120


class Scripted(Policy):
    """Down and up the ladder by the number of new tokens, out of its range too."""

    def start(self):
        return lambda request: (0, 1, 1, 9, 2, -3, 1)[request.new_tokens % 7]


def scripted_bits(bits, min_bits, made):
    return bits - min((0, 1, 1, 9, 2, 0, 1)[made % 7], bits - (min_bits or bits))


def events_of(handle):
    return [event for event in handle.events(WAIT) if isinstance(event, Token)]


def test_tokens_at_bits_that_a_policy_changes_are_those_of_one_request_that_switches_there(model, code, seed):
    chance = random.Random(seed)
    steady = steady_rows(model, torch.float32) or 16
    asked = []
    for bits, min_bits in [(4, 2), (4, 3), (3, 2), (4, None), (2, None), (2, 2)] * 3:
        length = chance.choice([2, steady, steady + 1, 50])
        start = chance.randrange(len(code) - length)
        asked.append((code[start : start + length], bits, min_bits, chance.randrange(1, 25)))
    expected = []
    for prompt, bits, min_bits, new in asked:
        plan = [scripted_bits(bits, min_bits, made) for made in range(new)]
        expected.append((switching(model, prompt, plan), plan))
    with Engine(model, max_requests=15, policy=Scripted()) as engine:
        handles = [
            engine.submit(Request(prompt, bits=bits, min_bits=min_bits, max_new_tokens=new, ignore_eos=True))
            for prompt, bits, min_bits, new in asked
        ]
        for handle, (tokens, plan) in zip(handles, expected, strict=True):
            events = events_of(handle)
            assert [event.bits for event in events] == plan
            assert [event.id for event in events] == tokens
        counted = engine.stats().tokens_by_bits
    assert counted == {str(bits): count for bits, count in Counter(b for _, plan in expected for b in plan).items()}


def test_under_any_load_requests_without_min_bits_are_served_as_asked(model, code, alone):
    always_behind = LoadPolicy(target_ms=1e-6, queue=1, dwell_ms=0)
    asked = [(code[start : start + 30], bits, 20) for start, bits in [(0, 4), (50, 3), (100, 2), (150, 4)]]
    expected = [alone(*request) for request in asked]
    with Engine(model, max_requests=3, policy=always_behind) as engine:
        firm = [engine.submit(Request(prompt, bits=bits, max_new_tokens=new)) for prompt, bits, new in asked]
        soft = [
            engine.submit(Request(code[start : start + 30], bits=4, min_bits=low, max_new_tokens=30, ignore_eos=True))
            for start, low in [(20, 2), (70, 3), (120, 4)]
        ]
        for handle, (_, bits, _), tokens in zip(firm, asked, expected, strict=True):
            events = events_of(handle)
            assert [event.id for event in events] == tokens
            assert {event.bits for event in events} == {bits}
        for handle, low in zip(soft, (2, 3, 4), strict=True):
            used = [event.bits for event in events_of(handle)]
            assert (used[0], min(used), used[-1]) == (4, low, low)


def test_prompts_can_be_lowered_too(model, code, alone):
    tokens = alone(code[:40], 2, 8)
    with Engine(model, policy=LoadPolicy(target_ms=1e-6, dwell_ms=0, prompts=1)) as engine:
        other = engine.submit(Request(code[:20], min_bits=2, max_new_tokens=500, ignore_eos=True))
        while len(other.tokens) < 10:  # by then the engine is two steps down
            pass
        assert engine.submit(Request(code[:40], min_bits=2, max_new_tokens=8)).result(WAIT) == tokens
        other.cancel()


def test_an_engine_with_room_serves_full_bits(model, code):
    with Engine(model, policy=LoadPolicy(target_ms=1e6)) as engine:
        handles = [engine.submit(Request(code[:20], min_bits=2, max_new_tokens=10)) for _ in range(4)]
        assert {event.bits for handle in handles for event in events_of(handle)} == {4}
        assert engine.stats().tokens_by_bits.keys() == {"4"}


def test_position_and_changed_bits_go_together(model, code):
    """set_bits moves the top of the ladder, also below min_bits: what was asked for last holds."""
    with Engine(model, policy=PositionPolicy(tokens=3)) as engine:
        handle = engine.submit(Request(code[:20], min_bits=3, max_new_tokens=9, ignore_eos=True))
        assert [event.bits for event in events_of(handle)] == [4] * 3 + [3] * 6
        low = engine.submit(Request(code[:20], min_bits=3, max_new_tokens=500, ignore_eos=True))
        low.set_bits(2)
        used = []
        for event in low.events(WAIT):
            used.append(event.bits)
            if len(used) == 40:
                low.cancel()
                break
        assert used[-1] == 2


def test_the_entropy_that_a_policy_sees_is_that_of_the_models_distribution(model, code):
    seen = []

    class Watching(EntropyPolicy):
        def start(self):
            return lambda request: seen.append(request.entropy) or 0

    prompt = code[:30]
    with Engine(model, policy=Watching()) as engine:
        tokens = engine.submit(Request(prompt, min_bits=2, max_new_tokens=8, ignore_eos=True)).result(WAIT)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens]), bits=4).logits[0, len(prompt) - 1 : -2]
    p = logits.double().softmax(-1)
    expected = -(p * p.log()).sum(-1) / torch.log(torch.tensor(logits.shape[-1], dtype=torch.float64))
    assert seen[:2] == [None, None], "when it was admitted and before its first token there was no distribution"
    torch.testing.assert_close(
        torch.tensor(seen[2:], dtype=torch.float64), expected, atol=0.02, rtol=0
    )  # int8 activations


@pytest.mark.parametrize("policy", [None, LoadPolicy(target_ms=1), PositionPolicy()], ids=str)
def test_entropies_are_not_computed_for_policies_that_do_not_want_them(model, code, policy, monkeypatch):
    def refuse(logits):
        raise AssertionError("nobody asked for entropies")

    monkeypatch.setattr(lowering, "normalised_entropy", refuse)
    with Engine(model, policy=policy) as engine:
        assert len(engine.submit(Request(code[:20], min_bits=2, max_new_tokens=4, ignore_eos=True)).result(WAIT)) == 4


def test_the_time_per_token_is_there_while_tokens_are_made(model, code):
    paces = []
    with Engine(model) as engine:
        first = engine.submit(
            Request(code[:20], max_new_tokens=6, ignore_eos=True),
            listener=lambda event: paces.append(engine.stats().time_per_token),
        )
        first.result(WAIT)
        assert engine.stats().to_json().keys() >= {"time_per_token", "tokens_by_bits"}
    assert paces[0] is None, "before the second token nothing is known"
    assert all(pace > 0 for pace in paces[2:])
