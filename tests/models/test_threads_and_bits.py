"""Threads in one model: right where they agree, refused where they do not, never at somebody else's bits."""

from __future__ import annotations

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import bitstrata
from bitstrata.errors import UsageError
from bitstrata.nn import bits_state

WAIT = 30
IDS = torch.tensor([[3, 9, 27, 81, 50]])


@pytest.fixture
def model(quantized):
    return bitstrata.load(quantized("llama")[2])


@pytest.fixture
def expected(model):
    """bits -> logits."""
    with torch.no_grad():
        return {bits: model(IDS, bits=bits).logits for bits in (2, 3, 8)}


class Inside:
    """Another thread in the middle of `call`, until `finish`."""

    def __init__(self, model, call):
        self._entered, self._leave = threading.Event(), threading.Event()
        me = threading.current_thread()

        def wait(*_):
            if threading.current_thread() is not me:
                self._entered.set()
                self._leave.wait(WAIT)

        self._hook = model.model.layers[1].register_forward_pre_hook(wait)
        self._pool = ThreadPoolExecutor(1)
        self._result = self._pool.submit(torch.no_grad()(call))
        assert self._entered.wait(WAIT)

    def finish(self):
        self._leave.set()
        result = self._result.result(WAIT)
        self._hook.remove()
        self._pool.shutdown()
        return result


CALLS = {
    "call": lambda model, bits: model(IDS, bits=bits).logits,
    "forward": lambda model, bits: model.forward(IDS, bits=bits).logits,
    "use_bits": lambda model, bits: with_bits(model, bits),
    "set": lambda model, bits: setattr(model, "bits", bits),
    "generate": lambda model, bits: model.generate(IDS, bits=bits, max_new_tokens=2, pad_token_id=0),
    "decoder": lambda model, bits: model.model(IDS, bits=bits),
    "rows": lambda model, bits: model(IDS, bits=torch.tensor([bits])).logits,
}


def with_bits(model, bits):
    with bitstrata.use_bits(model, bits):
        return model(IDS).logits


@torch.no_grad()
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("other", [8, None], ids=["at 8", "at what is set"])
def test_other_bits_in_the_middle_of_a_call_are_refused_and_the_call_is_right(model, expected, call, other):
    inside = Inside(model, lambda: model(IDS, bits=other).logits)
    with pytest.raises(UsageError, match="another thread is running this model at bits=8") as caught:
        CALLS[call](model, 2)
    assert "deepcopy" in caught.value.hint
    assert torch.equal(inside.finish(), expected[8])
    assert bits_state(model).value == 8
    if call != "set":
        CALLS[call](model, 2)
    assert torch.equal(model(IDS).logits, expected[8])


@torch.no_grad()
def test_equal_bits_run_side_by_side(model, expected):
    inside = Inside(model, lambda: model(IDS, bits=2).logits)
    assert torch.equal(model(IDS, bits=2).logits, expected[2])
    assert bits_state(model).value == 2, "the other call is still under way"
    assert torch.equal(inside.finish(), expected[2])
    assert bits_state(model).value == 8


@torch.no_grad()
def test_the_end_of_one_use_does_not_change_the_other(model, expected):
    """A block that ends while another thread runs at its bits."""
    with bitstrata.use_bits(model, 2):
        inside = Inside(model, lambda: model(IDS).logits)
    assert torch.equal(inside.finish(), expected[2])
    assert torch.equal(model(IDS).logits, expected[8])


@torch.no_grad()
def test_threads_started_inside_a_block_run_at_its_bits(model, expected):
    with bitstrata.use_bits(model, 3), ThreadPoolExecutor(3) as pool:
        for logits in pool.map(torch.no_grad()(lambda _: model(IDS).logits), range(6)):
            assert torch.equal(logits, expected[3])


def test_many_threads_are_never_wrong(model, expected):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    refused = []

    @torch.no_grad()
    def work(index):
        bits = (2, 3, 8, None)[index]
        for _ in range(25):
            try:
                logits = model(IDS, bits=bits).logits
            except UsageError:
                refused.append(bits)
            else:
                # without bits it runs at what is set, which another call may have done
                right = [expected[bits]] if bits else list(expected.values())
                assert any(torch.equal(logits, value) for value in right), bits

    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert refused, "nothing overlapped, so nothing was tried"
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected[8])


@torch.no_grad()
def test_copies_do_not_meet(model, expected):
    twin = copy.deepcopy(model)
    inside = Inside(model, lambda: model(IDS, bits=8).logits)
    assert torch.equal(twin(IDS, bits=2).logits, expected[2])
    assert torch.equal(copy.deepcopy(model)(IDS, bits=3).logits, expected[3])
    inside.finish()
