"""Plans per request: requests at different plans and bits in one batch, each as alone."""

from __future__ import annotations

import random
import threading
from types import MappingProxyType

import pytest
import torch

from bitstrata.errors import UnsupportedBitsError, UsageError
from bitstrata.nn import BitsState, bits_state, steady_rows
from bitstrata.runtime import Engine, LoadPolicy, Request, Token
from bitstrata.runtime.batching.packing import Segment, pack

WAIT = 120


@pytest.fixture(scope="module")
def plans(model):
    """A few plans, with bits by chance; the second differs from the first in one layer."""
    chance = random.Random(7)
    layers = list(bits_state(model).layers)
    made = [{layer: chance.choice((2, 3, 4)) for layer in layers} for _ in range(3)]
    made[1] = {**made[0], layers[0]: 2 + made[0][layers[0]] % 3}
    return made


def test_requests_at_plans_and_bits_in_one_batch_get_the_tokens_they_get_alone(model, code, alone, plans, seed):
    chance = random.Random(seed)
    steady = steady_rows(model, torch.float32) or 16
    requests = []
    for index in range(20):
        length = chance.choice([1, 3, steady, steady + 1, 40, 70])
        start = chance.randrange(len(code) - length)
        bits = (2, plans[0], 4, plans[1], 3, plans[2])[index % 6]
        requests.append((code[start : start + length], bits, chance.randrange(1, 30)))
    expected = [alone(*request) for request in requests]
    shared = set()
    with Engine(model, max_requests=18, max_batch_tokens=2 * steady + 9) as engine:
        run = engine._forward.model.forward

        def watch(*args, **kwargs):
            shared.add(type(bits_state(model).value))
            return run(*args, **kwargs)

        engine._forward.model.forward = watch
        try:
            handles = [engine.submit(Request(prompt, bits=bits, max_new_tokens=new)) for prompt, bits, new in requests]
            for handle, (_, bits, _), tokens in zip(handles, requests, expected, strict=True):
                assert handle.result(WAIT) == tokens
                used = {event.bits for event in handle.events() if isinstance(event, Token)}
                assert used == {bits if isinstance(bits, int) else None}
        finally:
            del engine._forward.model.forward
        counted = engine.stats().tokens_by_bits
    assert list in shared, "plans never shared a batch"
    on_plans = sum(len(tokens) for tokens, (_, bits, _) in zip(expected, requests, strict=True) if bits in plans)
    assert counted["plan"] == on_plans
    assert sum(counted.values()) == sum(map(len, expected))


def test_the_engine_keeps_a_plan_as_it_was_when_submitted(model, code, alone, plans):
    expected = alone(code[:30], plans[2], 20)
    backwards = dict(reversed(plans[2].items()))
    with Engine(model) as engine:
        handle = engine.submit(Request(code[:30], bits=MappingProxyType(backwards), max_new_tokens=20))
        for layer in backwards:
            backwards[layer] = 9
        assert handle.result(WAIT) == expected
        assert handle.bits == plans[2]
        assert list(handle.bits) == list(plans[2]), "in the order of the model's layers"


def test_a_request_can_be_moved_to_a_plan_and_back(model, code, plans):
    at = threading.Semaphore(0)
    with Engine(model) as engine:
        handle = engine.submit(Request(code[:30], bits=4, max_new_tokens=9, ignore_eos=True), lambda _: at.acquire())
        for change in (plans[0], 2):
            handle.set_bits(change)
            at.release(3)
            while len(handle.tokens) < 3 + (change == 2) * 3:
                pass
        at.release(9)
        used = [event.bits for event in handle.events(WAIT) if isinstance(event, Token)]
        with pytest.raises(UsageError, match="plan does not fit"):
            handle.set_bits({})
    assert used[-1] == 2
    assert None in used
    assert handle.bits == 2


def test_policies_leave_requests_with_a_plan_alone(model, code, alone, plans):
    expected = alone(code[:30], plans[0], 20)
    always_behind = LoadPolicy(target_ms=1e-6, dwell_ms=0)
    with Engine(model, policy=always_behind) as engine:
        lowered = engine.submit(Request(code[40:70], min_bits=2, max_new_tokens=25, ignore_eos=True))
        planned = engine.submit(Request(code[:30], bits=plans[0], max_new_tokens=20))
        assert planned.result(WAIT) == expected
        lowered.result(WAIT)
        assert engine.stats().tokens_by_bits.keys() == {"2", "3", "4", "plan"}


def test_a_models_own_forward_takes_a_plan_for_each_sequence(model, code, plans):
    ids = torch.tensor([code[:12], code[50:62], code[90:102]])
    with torch.no_grad():
        together = model(ids, bits=[plans[0], 3, plans[0]]).logits
        for row, bits in enumerate((plans[0], 3, plans[0])):
            torch.testing.assert_close(together[row], model(ids[row : row + 1], bits=bits).logits[0], rtol=0, atol=0.3)
            other = model(ids[row : row + 1], bits=2).logits[0]
            assert (together[row] - other).abs().max() > 1


@pytest.mark.parametrize(
    ("change", "min_bits", "error", "message"),
    [
        ({}, 2, UsageError, "min_bits=2 cannot go with a plan"),
        ({"model.layers.0.self_attn.q_proj": 7}, None, UnsupportedBitsError, "layer model.layers.0.self_attn.q_proj"),
        ({"lm_head": 4}, None, UsageError, "1 unknown"),
    ],
    ids=["min_bits", "bits", "layer"],
)
def test_wrong_plans_are_refused(model, code, plans, change, min_bits, error, message):
    with Engine(model) as engine:
        with pytest.raises(error, match=message):
            engine.submit(Request(code[:5], bits={**plans[0], **change}, min_bits=min_bits))
        with pytest.raises(UsageError, match="does not fit this model"):
            engine.submit(Request(code[:5], bits={}))
        assert engine.stats().waiting == 0


def test_short_requests_of_equal_plans_come_together():
    plans = [{"a": 2, "b": 4}, {"a": 4, "b": 2}]
    state = BitsState({"a": (2, 4), "b": (2, 4)}, fixed={"head": 8})
    asked = [dict(plans[owner % 2]) for owner in range(6)] + [2]
    waiting = [Segment(owner, 9, 1, state.resolve(bits)) for owner, bits in enumerate(asked)]
    batches = [[part.bits.given for part in batch] for batch in pack(waiting, 10, 3)]
    assert batches == [[2, plans[0], plans[0]], [plans[0], plans[1], plans[1]], [plans[1]]]
