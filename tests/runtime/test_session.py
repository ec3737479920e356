"""A session: the model's own tokens without a thread, kept between calls, and the model stays an ordinary one."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from random import Random

import pytest
import torch

import bitstrata
from bitstrata.errors import BatchError, CheckError, ResourceError, UsageError
from bitstrata.models import DraftLength, Speculation, end_tokens
from bitstrata.nn import bits_state
from bitstrata.runtime import Engine, Request, continue_tokens
from bitstrata.runtime.batching import Drafts, Sampler, continuation, session_of
from bitstrata.runtime.generation import GenerationSettings

WAIT = 120
NEW = 12


@pytest.fixture
def own_model(bundled, exact_kernel):
    """For tests that change it."""
    return bitstrata.load(bundled, dtype=torch.float32)


def start(own, prompt, bits, new=NEW, **settings):
    return own.start(prompt, at(own.model, bits), most=new, sampler=Sampler(0.0, 1.0, Random(0)), **settings)


def at(model, bits):
    return bits_state(model).resolve(bits)


def finish(own, item, bits):
    """Its tokens, up to the end."""
    while not item.new or item.ended() is None:
        own.step(item, at(own.model, bits))
    own.finish(item)
    return item.new


@pytest.mark.parametrize("length", [1, 2, 16, 17, 90, 520, 540])
def test_greedy_tokens_are_those_of_the_models_own_generate(model, code, alone, length):
    """Prompts of few rows, of many, and of one chunk and a rest that would be few by itself."""
    expected = [alone(code[:length], bits, NEW) for bits in (2, 4)]
    with session_of(model) as own:
        found = [finish(own, start(own, code[:length], bits, ends=end_tokens(model)), bits) for bits in (2, 4)]
    assert found == expected
    assert alone(code[:length], 2, NEW) == expected[0], "the model is an ordinary one again"


def test_texts_take_turns_and_grow(model, code, alone, monkeypatch):
    """Room is taken as they go; a text that moves takes along what it has."""
    monkeypatch.setattr(continuation, "GROWTH", 16)
    prompts = [code[:20], code[100:103], code[200:260]]
    expected = [alone(prompt, 3, 40) for prompt in prompts]
    moved = 0
    with session_of(model) as own:
        items = [start(own, prompt, 3, 40, ends=end_tokens(model)) for prompt in prompts]
        going = list(items)
        while going:
            for item in list(going):
                before = item.place
                own.step(item, at(model, 3))
                moved += item.place.start != before.start
                if item.ended() is not None:
                    own.finish(item)
                    going.remove(item)
    assert [item.new for item in items] == expected
    assert moved > 0


def test_a_session_is_kept_and_made_anew_for_a_model_that_was_changed(own_model, code):
    model = own_model
    with session_of(model) as first:
        before = finish(first, start(first, code[:30], 4), 4)
    model.generate(torch.tensor([code[:5]]), max_new_tokens=2, do_sample=False, pad_token_id=0)
    with session_of(model) as second:
        assert second is first
    with torch.no_grad():
        model.model.norm.weight.mul_(-1.0)
    with session_of(model) as third:
        assert third is not first
        assert finish(third, start(third, code[:30], 4), 4) != before
    seen = []
    hook = model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    with session_of(model) as fourth:
        finish(fourth, start(fourth, code[:5], 4, 3), 4)
    assert len(seen) > 3, "a hook sees every step"
    hook.remove()


def test_copies_have_sessions_of_their_own(own_model, code):
    with session_of(own_model) as own:
        expected = finish(own, start(own, code[:30], 3), 3)
    twin = copy.deepcopy(own_model)
    with session_of(twin) as other, session_of(own_model) as own:
        assert other is not own
        assert other.model is twin
        assert finish(other, start(other, code[:30], 3), 3) == expected


def test_an_engine_and_a_session_exclude_each_other(own_model, code):
    with session_of(own_model), pytest.raises(UsageError, match="an engine, or a call to generate"):
        Engine(own_model)
    with Engine(own_model) as engine:
        with pytest.raises(UsageError, match="an engine, or a call to generate"), session_of(own_model):
            pass
        expected = engine.submit(Request(code[:30], bits=2, max_new_tokens=NEW, ignore_eos=True)).result(WAIT)
    with session_of(own_model) as own:
        assert finish(own, start(own, code[:30], 2), 2) == expected


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
    with session_of(model), pytest.raises(UsageError, match="in the middle of a call"), session_of(model):
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
    with session_of(model) as own:
        item = start(own, code[:5], 4, rules=lambda _, logits: logits * torch.nan)
        with pytest.raises(CheckError, match="not finite"):
            finish(own, item, 4)
        own.finish(item)


def test_a_model_that_cannot_run_in_batches_runs_its_texts_alone(
    own_model, tokenizer, code, alone, monkeypatch, caplog
):
    """With the tokens of generate; drafts are checked by transformers' own loop."""

    def refuse(_):
        raise BatchError("it looks at the moon")

    monkeypatch.setattr("bitstrata.runtime.batching.forward.Forward.check", refuse)
    expected = tokenizer.decode(alone(code[:30], 4, NEW), skip_special_tokens=True)
    for drafts in (None, None, 2):
        settings = GenerationSettings(NEW, draft_bits=drafts)
        made = continue_tokens(own_model, tokenizer, code[:30], "", bits=4, settings=settings)
        assert made.text == expected
        assert (made.acceptance is None) == (drafts is None)
    assert caplog.text.count("it looks at the moon; each text runs by itself") == 1


def test_no_memory_leaves_the_model_and_the_session_as_they_were(own_model, code, alone, monkeypatch):
    """Also if some layers had got theirs already."""
    monkeypatch.setattr("bitstrata.runtime.batching.session.AMPLE", 64)
    prompts = [code[:30], code[:600]]
    with session_of(own_model) as own:
        found = [finish(own, start(own, prompts[0], 4), 4)]
    with monkeypatch.context() as patched:
        left = [10**12] * 5
        patched.setattr("bitstrata.runtime.batching.memory.free_memory", lambda: left.pop() if left else 1000)
        with pytest.raises(ResourceError, match="no memory for keys and values"), session_of(own_model) as own:
            start(own, prompts[1], 4)
    with session_of(own_model) as own:
        found += [finish(own, start(own, prompt, 4), 4) for prompt in prompts]
    assert found == [alone(prompt, 4, NEW) for prompt in (prompts[0], *prompts)]


@pytest.mark.parametrize(("bits", "draft_bits", "draft_tokens"), [(4, 2, 3), (4, 3, 1), (3, 2, 15), (4, 2, 40)])
def test_drafts_do_not_change_greedy_tokens(model, tokenizer, code, alone, bits, draft_bits, draft_tokens, monkeypatch):
    monkeypatch.setattr(DraftLength, "next", lambda self: self.most)  # always draft: the hard way
    for new in (1, 2, 7, 40):
        settings = GenerationSettings(new, draft_bits=draft_bits, draft_tokens=draft_tokens)
        made = continue_tokens(model, tokenizer, code[:40], "", bits=bits, settings=settings)
        expected = alone(code[:40], bits, new)
        assert made.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert made.tokens == model.speculation.tokens == len(expected)
        if new == 40:
            assert 0 < model.speculation.accepted <= model.speculation.drafted
            assert made.acceptance == model.speculation.acceptance


def test_drafts_obey_rules_of_the_generation_config(own_model, tokenizer, code, monkeypatch):
    monkeypatch.setattr(DraftLength, "next", lambda self: self.most)
    own_model.generation_config.repetition_penalty = 1.3
    own_model.generation_config.no_repeat_ngram_size = 2
    plain, drafted = (
        continue_tokens(own_model, tokenizer, code[:30], "", bits=4, settings=GenerationSettings(30, draft_bits=draft))
        for draft in (None, 2)
    )
    assert plain.text == drafted.text


def test_sampled_drafts_have_the_distribution_of_plain_sampling(model, code, seed, monkeypatch):
    """Third new token, the likeliest few and the rest: chi-square of two samples."""
    monkeypatch.setattr(DraftLength, "next", lambda self: self.most)
    draws, counts, drafted = 400, [Counter(), Counter()], [0, 0]
    at4 = at(model, 4)
    with session_of(model) as own:
        for draw in range(draws):
            for side in (0, 1):
                sampler = Sampler(1.5, 0.9, Random(f"{seed} {draw} {side}"))
                item = own.start(code[:20], at4, reuse="off", most=3, sampler=sampler)
                speculation = Speculation(2, 3)
                drafts = Drafts(model, speculation, at4)
                while not item.new or item.ended() is None:
                    own.draft_step(item, at4, drafts) if side else own.step(item, at4)
                own.finish(item)
                counts[side][item.new[-1]] += 1
                drafted = [drafted[0] + speculation.drafted, drafted[1] + speculation.accepted]
    assert 0.05 < drafted[1] / drafted[0] < 1, "some drafts are wrong, some right"
    often = [token for token, count in (counts[0] + counts[1]).items() if count >= 20]
    pairs = [(counts[0][token], counts[1][token]) for token in often]
    pairs.append((draws - sum(one for one, _ in pairs), draws - sum(other for _, other in pairs)))
    chi_square = sum((one - other) ** 2 / (one + other) for one, other in pairs if one + other)
    degrees = len(pairs) - 1
    assert chi_square < degrees + 6 * (2 * degrees) ** 0.5 + 12, (chi_square, degrees)


def test_drafts_that_cannot_be_made_are_refused(model, tokenizer, code):
    for settings, message in (((4, 4), "must be below"), ((8, 4), "bits=8"), ((2, 0), "draft_tokens must be")):
        asked = GenerationSettings(4, draft_bits=settings[0], draft_tokens=settings[1])
        with pytest.raises(UsageError, match=message):
            continue_tokens(model, tokenizer, code[:10], "", bits=4, settings=asked)
