"""A session: the model's own tokens without a thread, kept between calls, and the model stays an ordinary one."""

from __future__ import annotations

import copy
import threading
from random import Random

import pytest
import torch

import bitstrata
from bitstrata.errors import BatchError, CheckError, ResourceError, UsageError
from bitstrata.models import end_tokens
from bitstrata.nn import bits_state
from bitstrata.runtime import Engine, Request, continue_tokens
from bitstrata.runtime.batching import Sampler, continuation, session
from bitstrata.runtime.generation import GenerationSettings

WAIT = 120
NEW = 12


@pytest.fixture
def own_model(bundled, exact_kernel):
    """For tests that change it."""
    return bitstrata.load(bundled, dtype=torch.float32)


def start(own, prompt, new=NEW, **settings):
    return own.start(prompt, most=new, sampler=Sampler(0.0, 1.0, Random(0)), **settings)


def finish(own, item, bits):
    """Its tokens, up to the end."""
    while not item.new or item.ended() is None:
        own.step(item, bits_state(own.model).resolve(bits))
    own.finish(item)
    return item.new


@pytest.mark.parametrize("length", [1, 2, 16, 17, 90, 520, 540])
def test_greedy_tokens_are_those_of_the_models_own_generate(model, code, alone, length):
    """Prompts of few rows, of many, and of one chunk and a rest that would be few by itself."""
    expected = [alone(code[:length], bits, NEW) for bits in (2, 4)]
    with session(model) as own:
        found = [finish(own, start(own, code[:length], ends=end_tokens(model)), bits) for bits in (2, 4)]
    assert found == expected
    assert alone(code[:length], 2, NEW) == expected[0], "the model is an ordinary one again"


def test_texts_take_turns_and_grow(model, code, alone, monkeypatch):
    """Room is taken as they go; a text that moves takes along what it has."""
    monkeypatch.setattr(continuation, "GROWTH", 16)
    prompts = [code[:20], code[100:103], code[200:260]]
    expected = [alone(prompt, 3, 40) for prompt in prompts]
    moved = 0
    with session(model) as own:
        items = [start(own, prompt, 40, ends=end_tokens(model)) for prompt in prompts]
        going = list(items)
        while going:
            for item in list(going):
                before = item.place
                own.step(item, bits_state(model).resolve(3))
                moved += item.place.start != before.start
                if item.ended() is not None:
                    own.finish(item)
                    going.remove(item)
    assert [item.new for item in items] == expected
    assert moved > 0


def test_a_session_is_kept_and_made_anew_for_a_model_that_was_changed(own_model, code):
    model = own_model
    with session(model) as first:
        before = finish(first, start(first, code[:30]), 4)
    model.generate(torch.tensor([code[:5]]), max_new_tokens=2, do_sample=False, pad_token_id=0)
    with session(model) as second:
        assert second is first
    with torch.no_grad():
        model.model.norm.weight.mul_(-1.0)
    with session(model) as third:
        assert third is not first
        assert finish(third, start(third, code[:30]), 4) != before
    seen = []
    hook = model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    with session(model) as fourth:
        finish(fourth, start(fourth, code[:5], 3), 4)
    assert len(seen) > 3, "a hook sees every step"
    hook.remove()


def test_copies_have_sessions_of_their_own(own_model, code):
    with session(own_model) as own:
        expected = finish(own, start(own, code[:30]), 3)
    twin = copy.deepcopy(own_model)
    with session(twin) as other, session(own_model) as own:
        assert other is not own
        assert other.model is twin
        assert finish(other, start(other, code[:30]), 3) == expected


def test_an_engine_and_a_session_exclude_each_other(own_model, code):
    with session(own_model), pytest.raises(UsageError, match="an engine, or a call to generate"):
        Engine(own_model)
    with Engine(own_model) as engine:
        with pytest.raises(UsageError, match="an engine, or a call to generate"), session(own_model):
            pass
        expected = engine.submit(Request(code[:30], bits=2, max_new_tokens=NEW, ignore_eos=True)).result(WAIT)
    with session(own_model) as own:
        assert finish(own, start(own, code[:30]), 2) == expected


def test_threads_wait_for_each_other_and_a_thread_not_for_itself(model, tokenizer, code, alone):
    expected = {bits: alone(code[:20], bits, 20) for bits in (2, 4)}
    found = {}

    def ask(bits):
        settings = GenerationSettings(20)
        found[bits] = continue_tokens(model, tokenizer, code[:20], "", bits=bits, settings=settings).text

    threads = [threading.Thread(target=ask, args=(bits,)) for bits in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert found == {bits: tokenizer.decode(new, skip_special_tokens=True) for bits, new in expected.items()}
    with session(model), pytest.raises(UsageError, match="in the middle of a call"), session(model):
        pass


def test_what_the_generation_config_wants_of_logits_is_done(own_model, tokenizer, code):
    plain = GenerationSettings(24)
    before = continue_tokens(own_model, tokenizer, code[:30], "", bits=4, settings=plain).text
    own_model.generation_config.repetition_penalty = 1.5
    own_model.generation_config.min_new_tokens = 20
    found = continue_tokens(own_model, tokenizer, code[:30], "", bits=4, settings=plain)
    ids = own_model.generate(torch.tensor([code[:30]]), bits=4, max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert found.text == tokenizer.decode(ids[0, 30:], skip_special_tokens=True) != before


def test_logits_that_are_not_finite_are_an_error(model, code):
    with session(model) as own:
        item = start(own, code[:5], rules=lambda _, logits: logits * torch.nan)
        with pytest.raises(CheckError, match="not finite"):
            finish(own, item, 4)
        own.finish(item)


def test_a_model_that_cannot_run_in_batches_is_run_by_transformers(
    own_model, tokenizer, code, alone, monkeypatch, caplog
):
    def refuse(_):
        raise BatchError("it looks at the moon")

    monkeypatch.setattr("bitstrata.runtime.batching.forward.Forward.check", refuse)
    expected = tokenizer.decode(alone(code[:30], 4, NEW), skip_special_tokens=True)
    for _ in range(2):
        made = continue_tokens(own_model, tokenizer, code[:30], "", bits=4, settings=GenerationSettings(NEW))
        assert made.text == expected
    assert caplog.text.count("it looks at the moon; transformers' own generate is used") == 1


def test_no_memory_leaves_the_model_and_the_session_as_they_were(own_model, code, monkeypatch):
    with session(own_model) as own:
        expected = finish(own, start(own, code[:30]), 4)
    with monkeypatch.context() as patched:
        patched.setattr("bitstrata.runtime.batching.memory.free_memory", lambda: 1000)
        with pytest.raises(ResourceError, match="no memory for keys and values"), session(own_model) as own:
            start(own, code[:900])
    with session(own_model) as own:
        assert finish(own, start(own, code[:30]), 4) == expected
