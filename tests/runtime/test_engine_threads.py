"""An engine's thread and another in one model: each gets its own bits or a refusal."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import bitstrata
from bitstrata.errors import UsageError
from bitstrata.runtime import Engine, Request

WAIT = 60


def test_a_block_at_other_bits_ends_requests_with_a_refusal_and_no_token(model, code, alone):
    prompt = code[:9]
    expected = {bits: alone(prompt, bits, 5) for bits in (2, 4)}
    with Engine(model) as engine:
        with bitstrata.use_bits(model, 2):
            same = engine.submit(Request(prompt, bits=2, max_new_tokens=5, ignore_eos=True))
            assert same.result(WAIT) == expected[2]
            other = engine.submit(Request(prompt, bits=4, max_new_tokens=5, ignore_eos=True))
            with pytest.raises(UsageError, match="another thread is running this model at bits=2"):
                other.result(WAIT)
            assert other.tokens == []
        after = engine.submit(Request(prompt, bits=4, max_new_tokens=5, ignore_eos=True))
        assert after.result(WAIT) == expected[4]


def test_calls_while_a_request_runs_are_refused(model, code, alone):
    prompt, refused = code[:9], []
    expected = alone(prompt, 4, 3)
    with Engine(model) as engine:
        hook = model.get_input_embeddings().register_forward_pre_hook(lambda *_: refused.extend(attempts(model)))
        try:
            tokens = engine.submit(Request(prompt, bits=4, max_new_tokens=3, ignore_eos=True)).result(WAIT)
        finally:
            hook.remove()
    assert len(refused) == 2 * 3
    assert all("at bits=4" in str(error) for error in refused)
    assert tokens == expected


def attempts(model):
    """What becomes of two tries, in a thread of their own, to run or set the model at 2 bits."""
    with ThreadPoolExecutor(1) as pool:
        tries = [
            pool.submit(lambda: model(torch.tensor([[3]]), bits=2)),
            pool.submit(lambda: setattr(model, "bits", 2)),
        ]
    return [error for attempt in tries if (error := attempt.exception()) is not None]
