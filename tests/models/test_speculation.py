"""Drafts at few bits, checked at all bits: the result is that of the full bits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from architectures import CONFIGS
from transformers import DynamicCache, TextStreamer
from transformers.generation.streamers import BaseStreamer

import bitstrata
from bitstrata.demonstration.run import MODEL
from bitstrata.errors import UnsupportedBitsError, UsageError
from bitstrata.kernels.registry import describe
from bitstrata.models import speculation
from bitstrata.models.speculation import DraftLength, Speculation, accept

PROBLEM = "cpu", torch.float32
PROMPTS = ("def read_lines(path):\n", "import os\n\n\nclass Reader:\n    def")


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """No activations in int8: one row and several then differ by float32's rounding only, not by a flipped int8."""
    exact = [report.name for report in describe(*PROBLEM) if report.name.endswith("-exact") and report.reason is None]
    monkeypatch.setenv("BITSTRATA_KERNEL", exact[0] if exact else "reference")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("trained") / "out"
    bitstrata.quantize(MODEL, out, bits="2,4,8", method="rtn")
    return bitstrata.load(out, dtype=torch.float32), bitstrata.models.load_tokenizer(out)


def ids_of(tokenizer, prompt):
    return tokenizer(prompt, return_tensors="pt").input_ids


@pytest.mark.parametrize(("bits", "draft_bits", "draft_tokens"), [(4, 2, 3), (8, 4, 1), (8, 4, 7)])
def test_greedy_tokens_are_those_of_the_full_bits(trained, bits, draft_bits, draft_tokens, monkeypatch):
    model, tokenizer = trained
    monkeypatch.setattr(DraftLength, "next", lambda self: self.most)  # always draft: the hard way
    for prompt in PROMPTS:
        ids = ids_of(tokenizer, prompt)
        plain = model.generate(ids, bits=bits, max_new_tokens=12, do_sample=False)
        drafted = model.generate(
            ids, bits=bits, draft_bits=draft_bits, draft_tokens=draft_tokens, max_new_tokens=12, do_sample=False
        )
        assert torch.equal(plain, drafted)
        found = model.speculation
        assert found.tokens == plain.shape[1] - ids.shape[1]
        assert 0 < found.accepted <= found.drafted
        assert found.acceptance == found.accepted / found.drafted


def test_bits_are_what_they_were_afterwards(trained):
    model, tokenizer = trained
    model.bits = 4
    model.generate(ids_of(tokenizer, PROMPTS[0]), bits=8, draft_bits=2, max_new_tokens=5, do_sample=False)
    assert bitstrata.nn.bits_state(model).value == 4
    model.generate(ids_of(tokenizer, PROMPTS[0]), draft_bits=2, max_new_tokens=5, do_sample=False)
    assert bitstrata.nn.bits_state(model).value == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 3},
        {"min_new_tokens": 8},
        {"stop_strings": ["\n"]},
        {"eos_token_id": [10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_shapes_and_stops_generation_counts_token_by_token(trained, settings):
    model, tokenizer = trained
    if "stop_strings" in settings:
        settings = {**settings, "tokenizer": tokenizer}
    for prompt in PROMPTS:
        ids = ids_of(tokenizer, prompt)
        plain = model.generate(ids, bits=8, max_new_tokens=10, do_sample=False, **settings)
        drafted = model.generate(ids, bits=8, draft_bits=2, max_new_tokens=10, do_sample=False, **settings)
        assert torch.equal(plain, drafted)


def test_padding_on_the_left_is_not_seen(trained):
    model, tokenizer = trained
    ids = ids_of(tokenizer, PROMPTS[1])
    padded = torch.nn.functional.pad(ids, (3, 0), value=0)
    mask = (torch.arange(padded.shape[1]) >= 3).long().unsqueeze(0)
    plain = model.generate(ids, bits=8, max_new_tokens=20, do_sample=False)
    drafted = model.generate(padded, attention_mask=mask, bits=8, draft_bits=2, max_new_tokens=20, do_sample=False)
    assert torch.equal(plain, drafted[:, 3:])


def test_the_whole_context_can_be_used(quantized):
    _, _, folder = quantized("llama")
    model = bitstrata.load(folder, dtype=torch.float32)
    limit = model.config.max_position_embeddings
    ids = torch.randint(3, model.config.vocab_size, (1, limit - 9))
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    plain = model.generate(ids, bits=8, **settings)
    assert torch.equal(plain, model.generate(ids, bits=8, draft_bits=2, draft_tokens=6, **settings))
    assert plain.shape[1] == limit


@pytest.mark.parametrize("length", [6, 30])
@pytest.mark.parametrize("name", CONFIGS)
def test_architectures(quantized, name, length, monkeypatch):
    """Windows of 16 tokens in some: begun inside of them and beyond."""
    monkeypatch.setattr(DraftLength, "next", lambda self: self.most)
    _, _, folder = quantized(name)
    model = bitstrata.load(folder, dtype=torch.float32)
    ids = torch.randint(3, 50, (1, length))
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    plain = model.generate(ids, bits=8, **settings)
    assert torch.equal(plain, model.generate(ids, bits=8, draft_bits=2, **settings))
    assert model.speculation.drafted


class Collector(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended += 1


def test_streamers_get_every_token_once(trained):
    model, tokenizer = trained
    ids, seen = ids_of(tokenizer, PROMPTS[0]), Collector()
    found = model.generate(ids, bits=8, draft_bits=2, max_new_tokens=20, do_sample=False, streamer=seen)
    assert seen.tokens == found[0].tolist()
    assert seen.ended == 1
    model.generate(ids, bits=8, draft_bits=2, max_new_tokens=3, do_sample=False, streamer=TextStreamer(tokenizer))


def drawn(distribution):
    return int(torch.multinomial(distribution, 1))


def test_accepted_and_corrected_tokens_follow_the_full_bits_distribution(seed):
    """Algorithm 1 on random distributions: what comes out is distributed as p, whatever q is."""
    torch.manual_seed(seed)
    for _ in range(3):
        p, q = torch.randn(2, 6).mul(1.5).softmax(-1).unbind(0)
        count, draws = torch.zeros(6), 4000
        for _ in range(draws):
            draft = drawn(q)
            accepted, last = accept([draft], [q], [p, torch.ones(6)], drawn, lambda: float(torch.rand(())))
            count[draft if accepted else last] += 1
        chi_square = float(((count - draws * p).square() / (draws * p)).sum())
        assert chi_square < 35, (count / draws, p)  # 5 degrees of freedom: one run in a million


def test_sampling_has_the_distribution_of_plain_sampling(quantized, seed):
    """Third new token of a random model of 64 tokens, hot enough that drafts are often wrong."""
    _, _, folder = quantized("llama")
    model = bitstrata.load(folder, dtype=torch.float32)
    ids = torch.tensor([[5, 9, 11]])
    vocabulary, draws = model.config.vocab_size, 300
    counts, drafted = torch.zeros(2, vocabulary), torch.zeros(2)
    torch.manual_seed(seed)
    settings = {"max_new_tokens": 3, "do_sample": True, "top_k": 4, "eos_token_id": None, "bits": 8}
    for row, extra in enumerate(({}, {"draft_bits": 2, "draft_tokens": 3})):
        for _ in range(draws):
            counts[row, model.generate(ids, **settings, **extra)[0, -1]] += 1
            if extra:
                drafted += torch.tensor([model.speculation.drafted, model.speculation.accepted])
    assert 0.05 < drafted[1] / drafted[0] < 1, "some drafts are wrong, some right"
    often = counts.sum(0) >= 20
    both = torch.cat([counts[:, often], counts[:, ~often].sum(1, keepdim=True)], 1)
    both = both[:, both.sum(0) > 0]
    chi_square = float(((both[0] - both[1]).square() / both.sum(0)).sum())
    degrees = both.shape[1] - 1
    assert chi_square < degrees + 6 * (2 * degrees) ** 0.5 + 12, (chi_square, degrees)


def test_equal_seeds_give_equal_tokens(trained):
    model, tokenizer = trained
    ids = ids_of(tokenizer, PROMPTS[0])
    found = []
    for _ in range(2):
        torch.manual_seed(7)
        found.append(model.generate(ids, bits=8, draft_bits=2, max_new_tokens=30, do_sample=True, top_k=0))
    assert torch.equal(*found)


def test_what_cannot_be_drafted_is_refused(trained):
    model, tokenizer = trained
    ids = ids_of(tokenizer, PROMPTS[0])
    with pytest.raises(UnsupportedBitsError, match="3"):
        model.generate(ids, bits=8, draft_bits=3)
    for wrong, message in (
        ({"bits": 4, "draft_bits": 4}, "must be below"),
        ({"bits": 8, "draft_bits": 2, "draft_tokens": 0}, "draft_tokens must be at least 1"),
        ({"bits": torch.tensor([8]), "draft_bits": 2}, "one bits value for the whole sequence"),
        ({"bits": 8, "draft_bits": 2, "num_beams": 2}, "one sequence at a time"),
        ({"bits": 8, "draft_bits": 2, "use_cache": False}, "need the key-value cache"),
        ({"bits": 8, "draft_bits": 2, "cache_implementation": "static"}, "cache that can be cut"),
        ({"bits": 8, "draft_bits": 2, "return_dict_in_generate": True}, "only token ids are returned"),
    ):
        with pytest.raises(UsageError, match=message):
            model.generate(ids, max_new_tokens=4, do_sample=False, **wrong)
    with pytest.raises(UsageError, match="one sequence at a time"):
        model.generate(ids.repeat(2, 1), bits=8, draft_bits=2, max_new_tokens=4, do_sample=False)


def test_drafts_grow_while_they_pay_and_stop_when_they_do_not():
    cheap = DraftLength(8, cost=0.25, row_cost=0.02)
    for _ in range(100):
        cheap.learn(8, 8)
    assert cheap.next() == 8
    for _ in range(100):
        cheap.learn(8, 0)
    tries = [cheap.next() for _ in range(200)]
    assert 0 < sum(tries) < 12, "now and then one token is tried"
    dear = DraftLength(8, cost=0.9, row_cost=0.3)
    for _ in range(100):
        dear.learn(4, 4)
    assert max(itertools.islice(iter(dear.next, None), 20)) <= 1, "a draft that costs as much as it brings"


def test_acceptance_of_nothing_is_unknown():
    assert Speculation(2).acceptance is None


def test_a_cache_that_holds_part_of_the_prompt_is_continued(trained):
    model, tokenizer = trained
    ids = ids_of(tokenizer, PROMPTS[1])
    settings = {"bits": 8, "max_new_tokens": 8, "do_sample": False}
    plain = model.generate(ids, **settings)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :4], past_key_values=cache, use_cache=True, bits=8)
    assert torch.equal(plain, model.generate(ids, past_key_values=cache, draft_bits=2, **settings))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])  # two of them with windows of 16 tokens
@pytest.mark.parametrize("prompt", [6, 30])
@pytest.mark.parametrize("new", [1, 2, 3, 4, 6])
def test_the_cache_ends_where_the_tokens_do_and_can_be_continued(quantized, name, prompt, new, seed, monkeypatch):
    """Also where a stop comes in the middle of drafts that were accepted."""
    monkeypatch.setattr(DraftLength, "next", lambda self: self.most)
    monkeypatch.setattr(speculation, "accept", everything_but_the_last)
    model = bitstrata.load(quantized(name)[2], dtype=torch.float32)
    ids = torch.randint(3, 50, (1, prompt), generator=torch.Generator().manual_seed(seed))
    cache = DynamicCache(config=model.config)
    settings = {"do_sample": False, "eos_token_id": None, "bits": 8}
    # drafts at other bits, taken over whatever the full bits think: the cache still is that of the full bits
    found = model.generate(ids, max_new_tokens=new, draft_bits=3, draft_tokens=4, past_key_values=cache, **settings)
    assert found.shape[1] == prompt + new
    assert cache.get_seq_length() == found.shape[1] - 1
    more = torch.randint(3, 50, (1, 5), generator=torch.Generator().manual_seed(seed + 1))
    ids = torch.cat([found, more], 1)
    again = model.generate(ids, max_new_tokens=8, past_key_values=cache, **settings)
    assert torch.equal(again, model.generate(ids, max_new_tokens=8, **settings))


def everything_but_the_last(drafts, guesses, wanted, draw, uniform):
    return len(drafts), draw(wanted[-1])


def test_whole_numbers_of_other_libraries_are_draft_bits(trained):
    model, tokenizer = trained
    ids = ids_of(tokenizer, PROMPTS[0])
    plain = model.generate(ids, bits=8, max_new_tokens=6, do_sample=False)
    for four in (np.int64(4), torch.tensor(4)):
        drafted = model.generate(ids, bits=np.int8(8), draft_bits=four, max_new_tokens=6, do_sample=False)
        assert torch.equal(plain, drafted)
        assert model.speculation.draft_bits == 4
    for wrong in (2.0, "2", True):
        with pytest.raises(UnsupportedBitsError) as caught:
            model.generate(ids, bits=8, draft_bits=wrong, max_new_tokens=6, do_sample=False)
        assert caught.value.hint == "supported bits: 2, 4, 8"
