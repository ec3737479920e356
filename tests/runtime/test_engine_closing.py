"""Starting and closing an engine: what happens to requests, and to the model."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

import bitstrata
from bitstrata.errors import ResourceError, UsageError
from bitstrata.nn import bits_state
from bitstrata.runtime import Engine, Finished, Request

WAIT = 120


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_models.tiny_llama(folder / "source")
    settings = {"bits": "2,4", "method": "rtn", "group_size": 32}
    bitstrata.quantize(folder / "source", folder / "out", **settings)
    return folder


@pytest.fixture
def small(tiny):
    return bitstrata.load(tiny / "out", dtype=torch.float32)


def many(engine, count=6):
    return [engine.submit(Request([3, 4, 5], max_new_tokens=30, ignore_eos=True)) for _ in range(count)]


def test_draining_finishes_everything_that_was_submitted(small):
    engine = Engine(small, max_requests=2)
    handles = many(engine)
    engine.close(drain=True)
    assert all(handle.finished == Finished("length") and len(handle.tokens) == 30 for handle in handles)
    engine.close()


def test_closing_without_draining_cancels_everything(small):
    engine = Engine(small, max_requests=2)
    handles = many(engine, 40)
    engine.close(drain=False)
    assert all(handle.finished is not None for handle in handles)
    assert handles[-1].finished == Finished("cancelled")
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.cache_used_tokens, stats.cache_bytes) == (0, 0, 0, 0)


def test_a_closed_engine_refuses_requests_and_its_model_is_as_before(small):
    ids = torch.tensor([[3, 4, 5, 6]])
    attention, before = small.config._attn_implementation, small(ids, bits=2).logits
    state = bits_state(small).value
    with Engine(small) as engine:
        many(engine, 2)
        with pytest.raises(UsageError, match="run by an Engine"):
            small(ids)
        with pytest.raises(UsageError, match="an engine, or a call"):
            Engine(small)
    with pytest.raises(UsageError, match="closed"):
        many(engine, 1)
    assert small.config._attn_implementation == attention
    assert bits_state(small).value == state
    assert torch.equal(small(ids, bits=2).logits, before)


def test_an_error_in_the_with_block_does_not_wait_for_the_requests(small):
    handles = []

    def fail():
        with Engine(small, max_requests=1) as engine:
            handles.extend(many(engine, 40))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert handles[-1].finished == Finished("cancelled")


def test_a_thread_that_dies_ends_every_request_with_its_error(small, monkeypatch):
    engine = Engine(small)

    def fail():
        raise RuntimeError("a defect, for this test")

    monkeypatch.setattr(engine, "_round", fail)
    handles = many(engine, 1)
    with pytest.raises(RuntimeError, match="a defect"):
        handles[0].result(WAIT)
    engine._thread.join(WAIT)
    with pytest.raises(UsageError, match="has failed"):
        many(engine, 1)
    engine.close()


def test_a_cache_for_which_there_is_no_memory(small, monkeypatch):
    """Asked for as a number, or refused by torch in the first batch: both are memory, not the model's architecture."""
    with pytest.raises(ResourceError, match="no memory for keys and values of 3000000000 tokens") as refused:
        Engine(small, cache_tokens=3_000_000_000)
    assert "cache_tokens" in refused.value.hint
    with monkeypatch.context() as patched:
        patched.setattr("bitstrata.runtime.batching.memory.free_memory", lambda: 1000)  # the system would grant more
        with pytest.raises(ResourceError, match="no memory for keys and values"):
            Engine(small)
    with monkeypatch.context() as patched:

        def fail(*_):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

        patched.setattr("bitstrata.runtime.batching.forward.Forward._through_modules", fail)
        with pytest.raises(ResourceError, match="no memory to run LlamaForCausalLM"):
            Engine(small)
    assert len(small.generate(torch.tensor([[3, 4]]), max_new_tokens=1, do_sample=False)[0]) == 3
    Engine(small).close()


def test_as_many_requests_as_one_likes(small):
    """No other limit, that nobody gave, stands in the way."""
    with Engine(small, max_requests=600, cache_tokens=4800) as engine:
        handles = [engine.submit(Request([3, 4, 5], max_new_tokens=2, ignore_eos=True)) for _ in range(600)]
        assert all(len(handle.result(WAIT)) == 2 for handle in handles)


def test_wrong_settings_and_models_are_refused(tiny, small):
    for wrong in ({"max_requests": 0}, {"max_waiting": 0}, {"max_batch_tokens": 8}, {"cache_tokens": 16}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Engine(small, **wrong)
    with pytest.raises(UsageError, match="no quantized layers"):
        Engine(AutoModelForCausalLM.from_pretrained(tiny / "source"))
    Engine(small).close()
