"""Sampling in a batch: each request at its own settings, from its own random numbers."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch

import bitstrata
from bitstrata.errors import CheckError
from bitstrata.models import encode_prompt
from bitstrata.runtime import Engine, Request
from bitstrata.runtime.batching.sampling import Sampler, choose

WAIT = 120
DRAWS = 4000


def sampler(temperature=1.0, top_p=1.0, seed=0, logprobs=None):
    return Sampler(temperature, top_p, random.Random(seed), logprobs)


def nucleus(logits, temperature, top_p):
    """The distribution to sample from, token by token: the likeliest until their probability reaches top_p."""
    probability = (logits.double() / temperature).softmax(-1).tolist()
    kept, reached = {}, 0.0
    for token in sorted(range(len(probability)), key=lambda token: -probability[token]):
        kept[token] = probability[token]
        reached += probability[token]
        if reached >= top_p:
            break
    return {token: value / reached for token, value in kept.items()}


def test_frequencies_are_those_of_each_rows_own_distribution(seed):
    """Chi-square of three requests in one batch; each limit is passed by chance once in a million."""
    generator = torch.Generator().manual_seed(seed)
    settings = [(1.0, 1.0), (0.5, 1.0), (1.5, 0.7)]
    logits = 1.5 * torch.randn(3, 8, generator=generator)
    samplers = [sampler(*pair, seed=seed + row) for row, pair in enumerate(settings)]
    counts = [Counter() for _ in settings]
    for _ in range(DRAWS):
        for count, choice in zip(counts, choose(logits, samplers), strict=True):
            count[choice.id] += 1
    for row, pair in enumerate(settings):
        expected = nucleus(logits[row], *pair)
        assert set(counts[row]) <= set(expected), "a token outside top_p was taken"
        chi = sum((counts[row][token] - DRAWS * share) ** 2 / (DRAWS * share) for token, share in expected.items())
        assert chi < 46, f"row {row}: {counts[row]} instead of {expected}"  # 7 degrees of freedom


def test_greedy_rows_and_extreme_settings():
    logits = torch.tensor([[0.0, 3.0, 2.9, -1.0]]).repeat(4, 1)
    samplers = [sampler(0.0), sampler(1e-30), sampler(1.0, 1e-9), sampler(1e30, 1.0, seed=3)]
    for _ in range(20):
        taken = [choice.id for choice in choose(logits, samplers)]
        assert taken[:3] == [1, 1, 1]
    assert len({choose(logits, samplers)[3].id for _ in range(60)}) == 4  # almost uniform


def test_a_forbidden_token_is_never_taken_and_unusable_logits_are_an_error():
    logits = torch.tensor([[float("-inf"), 1.0, float("-inf")], [float("nan"), 1.0, 0.0], [0.0, 5.0, 0.0]])
    for _ in range(50):
        first, second, third = choose(logits, [sampler(5.0), sampler(), sampler(0.0)])
        assert first.id == 1
        assert isinstance(second, CheckError)
        assert third.id == 1


def test_a_seeded_request_draws_the_same_tokens_in_any_company(model, code, seed):
    request = Request(code[:25], bits=3, max_new_tokens=25, temperature=0.9, top_p=0.95, seed=seed, ignore_eos=True)
    with Engine(model, max_requests=20) as engine:
        by_itself = engine.submit(request).result(WAIT)
        company = [
            Request(code[start : start + 30], bits=bits, max_new_tokens=20, temperature=heat, seed=None)
            for start, bits, heat in zip(range(0, 180, 10), (2, 3, 4) * 6, (0.0, 1.0) * 9, strict=True)
        ]
        handles = [engine.submit(other) for other in company[:9]]
        again = engine.submit(request)
        handles += [engine.submit(other) for other in company[9:]]
        assert again.result(WAIT) == by_itself
        other_seed = Request(**{**vars(request), "seed": seed + 1})
        assert engine.submit(other_seed).result(WAIT) != by_itself
        for handle in handles:
            handle.result(WAIT)


@pytest.mark.parametrize("temperature", [1e-60, 5e-324])
def test_the_smallest_temperatures_are_greedy(temperature):
    """In float32 they would be 0, and the likeliest token's own logit 0 / 0."""
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert [choice.id for choice in choose(logits, [sampler(temperature)])] == [1]


@pytest.mark.parametrize("count", [0, 2])
def test_log_probabilities_do_not_depend_on_temperature_and_top_p(count):
    logits = torch.tensor([[1.0, 2.0, 0.5]])
    (choice,) = choose(logits, [sampler(7.0, 0.9, logprobs=count)])
    expected = logits[0].log_softmax(-1)
    assert choice.logprob == pytest.approx(float(expected[choice.id]))
    assert [token for token, _ in choice.top] == [1, 0][:count]


@pytest.mark.parametrize("draft_bits", [None, 2])
def test_generate_samples_by_its_seed_and_leaves_the_programs_generators_alone(model, tokenizer, draft_bits):
    prompt, settings = "def area(width, height):", {"temperature": 1.2, "top_p": 0.9, "draft_bits": draft_bits}
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    texts = [
        bitstrata.generate(model, prompt, 4, 24, seed=seed, tokenizer=tokenizer, **settings).text for seed in (7, 8, 7)
    ]
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    assert texts[0] == texts[2] != texts[1]
    if draft_bits is None:  # the same numbers as a request of an engine draws
        asked = Request(encode_prompt(tokenizer, prompt), bits=4, max_new_tokens=24, seed=7, temperature=1.2, top_p=0.9)
        with Engine(model, tokenizer) as engine:
            own = engine.submit(asked).result(WAIT)
        assert tokenizer.decode(own, skip_special_tokens=True) == texts[0]
