"""What ends a request: special tokens in stop texts, the tokenizer's end of text, a tokenizer that fails."""

from __future__ import annotations

import copy

import pytest
import torch

from bitstrata.runtime import Engine, Finished, Request
from bitstrata.runtime.generation import GenerationSettings, continue_tokens

WAIT = 120  # seconds for one event before a test gives up; no test measures time
NEW = 40


@pytest.fixture(scope="module")
def prompt(code) -> list[int]:
    return code[:40]


@pytest.fixture(scope="module")
def plain(prompt, alone) -> list[int]:
    """What the model goes on with at 4 bits."""
    return alone(prompt, 4, NEW)


@pytest.fixture(scope="module")
def last(plain, tokenizer) -> int:
    """The place of a token in the middle that was not there before, and whose name is its text."""
    names = tokenizer.convert_ids_to_tokens(plain)
    return next(
        place for place in range(6, len(plain)) if names[place].isascii() and names.index(names[place]) == place
    )


@pytest.fixture
def special(tokenizer, plain, last):
    """A tokenizer to which that token is special, and the token's name."""
    made, name = copy.deepcopy(tokenizer), tokenizer.convert_ids_to_tokens(plain[last])
    made.add_special_tokens({"additional_special_tokens": [name]})
    assert made.convert_tokens_to_ids(name) == plain[last]
    assert made.decode([plain[last]], skip_special_tokens=True) == ""
    return made, name


def test_a_stop_text_that_is_a_special_token_is_that_token(model, special, prompt, plain, last):
    tokenizer, name = special
    before = tokenizer.decode(plain[last - 2 : last])
    with Engine(model, tokenizer) as engine:
        for stop in ([name], ["never to be seen", name], [before[-3:] + name]):
            handle = engine.submit(Request(prompt, bits=4, max_new_tokens=NEW, stop=stop, ignore_eos=True))
            assert handle.result(WAIT) == plain[: last + 1], stop
            assert handle.finished == Finished("stop")
        other = engine.submit(Request(prompt, bits=4, max_new_tokens=NEW, stop=["?" + name], ignore_eos=True))
        assert other.result(WAIT) == plain


def test_the_tokenizers_end_of_text_ends_what_the_config_does_not_know(model, special, prompt, plain, last):
    tokenizer, name = special
    tokenizer.eos_token = name
    assert plain[last] not in (model.config.eos_token_id, model.generation_config.eos_token_id)
    settings = {"bits": 4, "max_new_tokens": NEW}
    with Engine(model, tokenizer) as engine:
        ended = engine.submit(Request(prompt, **settings))
        assert ended.result(WAIT) == plain[: last + 1]
        assert ended.finished == Finished("stop")
        assert engine.submit(Request(prompt, **settings, ignore_eos=True)).result(WAIT) == plain
    for draft in (None, 2):
        asked = GenerationSettings(NEW, draft_bits=draft)
        text = continue_tokens(model, tokenizer, prompt, "", bits=4, settings=asked)
        assert text.tokens == last + 1
        assert text.text == tokenizer.decode(plain[:last], skip_special_tokens=True)


def test_stop_strings_of_generate_end_at_a_special_token_with_drafts_too(model, special, prompt, plain, last):
    tokenizer, name = special
    settings = {"bits": 4, "max_new_tokens": NEW, "do_sample": False, "stop_strings": [name], "tokenizer": tokenizer}
    for draft in ({}, {"draft_bits": 2}):
        ids = model.generate(torch.tensor([prompt]), **settings, **draft)
        assert ids[0, len(prompt) :].tolist() == plain[: last + 1]


def test_an_error_of_the_tokenizer_ends_its_own_request_only(model, tokenizer, prompt, plain, last, monkeypatch):
    made = copy.deepcopy(tokenizer)
    decode = made.decode

    def fails(tokens, **settings):
        if plain[last] in tokens:
            raise OverflowError("the tokenizer's own, for this test")
        return decode(tokens, **settings)

    monkeypatch.setattr(made, "decode", fails)
    with Engine(model, made) as engine:
        requests = [
            Request(prompt, bits=4, max_new_tokens=NEW, ignore_eos=True, stop=stop) for stop in ([], ["\0"], [])
        ]
        first, broken, third = [engine.submit(request) for request in requests]
        assert first.result(WAIT) == third.result(WAIT) == plain
        with pytest.raises(OverflowError, match="for this test"):
            broken.result(WAIT)
        assert broken.tokens == plain[: last + 1]
        assert engine.submit(Request(prompt, bits=4, max_new_tokens=NEW, ignore_eos=True)).result(WAIT) == plain
        assert engine.stats().cache_used_tokens == 0
