"""Sampling in a batch: each request at its own settings, from its own random numbers."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import (
    GenerationConfig,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import bitstrata
from bitstrata.errors import BitstrataError, CheckError, InputError
from bitstrata.models import SamplingDefaults, encode_prompt
from bitstrata.runtime import Engine, Finished, Request, Token
from bitstrata.runtime.batching import engine as engine_module
from bitstrata.runtime.batching.rules import rules_of
from bitstrata.runtime.batching.sampling import Sampler, choose, likeliest_first

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


WARPED = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 3},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 0.9, "top_k": 5, "top_p": 0.7},
    {"temperature": 1.1, "min_p": 0.2},
    {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "min_p": 0.1},
]


def test_what_is_sampled_from_is_what_transformers_warpers_leave(seed):
    """In one batch, each row by its own settings."""
    logits = 2 * torch.randn(len(WARPED), 12, generator=torch.Generator().manual_seed(seed))
    samplers = [
        Sampler(
            one["temperature"], one.get("top_p", 1.0), random.Random(0), None, one.get("top_k", 0), one.get("min_p", 0)
        )
        for one in WARPED
    ]
    probability, order = likeliest_first(logits, samplers)
    found = torch.zeros_like(probability).scatter_(1, order, probability / probability.sum(-1, keepdim=True))
    for row, one in enumerate(WARPED):
        warpers = [TemperatureLogitsWarper(one["temperature"])]
        warpers += [TopKLogitsWarper(one["top_k"])] if "top_k" in one else []
        warpers += [TopPLogitsWarper(one["top_p"])] if "top_p" in one else []
        warpers += [MinPLogitsWarper(one["min_p"])] if "min_p" in one else []
        scores = logits[row : row + 1].double()
        for warper in warpers:
            scores = warper(None, scores)
        torch.testing.assert_close(found[row], scores[0].softmax(-1), msg=str(one))


def test_a_row_that_keeps_all_tokens_is_the_same_to_the_last_bit_beside_one_that_does_not():
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(3))
    plain, cut = sampler(0.9, 0.8), Sampler(0.9, 0.8, random.Random(0), None, 4, 0.3)
    alone, beside = likeliest_first(logits[:1], [plain])[0], likeliest_first(logits, [plain, cut])[0]
    assert torch.equal(alone[0], beside[0])
    assert 0 < int((beside[1] > 0).sum()) <= 4


def test_penalties_and_biases_are_openais_formula(seed):
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(seed))
    prompt, new = [1, 2, 2], [3, 3, 4]
    asked = Request(prompt, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.5, logit_bias={7: -3.0})
    rules = rules_of(asked, [0], torch.device("cpu"), None)
    expected = logits[0].tolist()
    for token in {*prompt, *new}:
        expected[token] = expected[token] * 1.5 if expected[token] < 0 else expected[token] / 1.5
    for token in set(new):
        expected[token] -= 0.5 + 0.25 * new.count(token)
    expected[7] -= 3
    before = logits.clone()
    torch.testing.assert_close(rules(torch.tensor([[*prompt, *new]]), logits)[0], torch.tensor(expected))
    assert torch.equal(logits, before), "log-probabilities are those of the model"
    assert rules_of(Request(prompt), [0], torch.device("cpu"), None) is None
    least = rules_of(Request(prompt, min_tokens=4), [0, 5], torch.device("cpu"), None)
    early, late = (least(torch.tensor([[*prompt, *tokens]]), logits.clone())[0] for tokens in (new, [*new, 6]))
    assert early[[0, 5]].tolist() == [float("-inf")] * 2
    assert torch.equal(late, logits[0])


def test_each_request_of_a_batch_has_its_own_rules_and_others_none(model, code, alone):
    prompt = code[:30]
    plain = alone(prompt, 4, 20)
    with Engine(model, max_requests=8) as engine:
        without = [Request(prompt, bits=4, max_new_tokens=20, logprobs=0)] * 2
        barred = Request(prompt, bits=4, max_new_tokens=20, logit_bias={plain[0]: -100.0}, logprobs=1, ignore_eos=True)
        repeated = Request(prompt, bits=3, max_new_tokens=20, frequency_penalty=2.0, ignore_eos=True)
        late = Request(prompt, bits=4, max_new_tokens=20, stop=(plain[2],), min_tokens=10, ignore_eos=True)
        handles = [engine.submit(one) for one in (without[0], barred, repeated, late, without[1])]
        made = [handle.result(WAIT) for handle in handles]
    assert made[0] == made[4] == plain
    assert plain[0] not in made[1]
    assert len(made[3]) >= 10
    first = next(iter(handles[1].events()))
    assert first.top[0][0] == plain[0], "log-probabilities do not know of biases"
    assert first.logprob < first.top[0][1]
    assert max(Counter(made[2]).values()) <= max(Counter(alone(prompt, 3, 20)).values())


@pytest.mark.parametrize("length", [1, 7, 16, 17, 60, 300])
def test_the_log_probabilities_of_a_prompt_are_the_models_own(model, code, length, monkeypatch):
    """In a mixed batch, in stretches, whatever the cache holds of it."""
    monkeypatch.setattr(engine_module, "SCORED_BYTES", 0)
    prompt, bits = code[40 : 40 + length], {2: 1, 3: 0, 4: 5}
    with Engine(model, max_requests=8) as engine:
        engine.submit(Request(prompt, bits=3, max_new_tokens=1)).result(WAIT)
        busy = [engine.submit(Request(code[:9], bits=4, max_new_tokens=40, ignore_eos=True)) for _ in range(2)]
        asked = [
            Request(prompt, bits=one, max_new_tokens=most, prompt_logprobs=top, ignore_eos=True)
            for (one, top), most in zip(bits.items(), (0, 3, 1), strict=True)
        ]
        handles = [engine.submit(one) for one in asked]
        events = [list(handle.events(WAIT)) for handle in handles]
        for handle in busy:
            assert len(handle.result(WAIT)) == 40
        assert engine.stats().cache_used_tokens == 0
    for (one, top), most, (scored, *rest) in zip(bits.items(), (0, 3, 1), events, strict=True):
        assert [token.id for token in scored.tokens] == prompt
        assert scored.tokens[0].logprob is None
        assert [type(event) for event in rest] == [Token] * most + [Finished]
        with torch.no_grad():
            values = model(torch.tensor([prompt]), bits=one).logits[0].float().log_softmax(-1)
        for place, token in enumerate(scored.tokens[1:]):
            assert token.logprob == pytest.approx(float(values[place, token.id]), abs=0.02)
            assert len(token.top) == top
            if top:
                assert token.top[0][1] == pytest.approx(float(values[place].max()), abs=0.02)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"logit_bias": {10**9: 1.0}}, "not a token"),
        ({"logit_bias": {5: float("inf")}}, "finite"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"max_new_tokens": 0}, "at least 1"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(model, settings, said):
    with Engine(model) as engine, pytest.raises(BitstrataError) as refused:
        engine.submit(Request([5], **settings))
    assert said in refused.value.sentence


def test_the_models_rules_hold_where_a_request_wants_them(model, code, alone, monkeypatch):
    plain = alone(code[:30], 4, 8)
    monkeypatch.setattr(model.generation_config, "suppress_tokens", [plain[0]], raising=False)
    with Engine(model) as engine:
        without, within = (
            engine.submit(Request(code[:30], bits=4, max_new_tokens=8, model_rules=rules)).result(WAIT)
            for rules in (False, True)
        )
    assert without == plain
    assert plain[0] not in within
    own = GenerationConfig(temperature=0.6, top_k=20, do_sample=True)
    assert SamplingDefaults.of(own) == SamplingDefaults(temperature=0.6, top_k=20)
    assert SamplingDefaults.of(GenerationConfig(do_sample=False, top_p=0.9)).temperature == 0
    assert SamplingDefaults.of(None) == SamplingDefaults.of(GenerationConfig()) == SamplingDefaults()
    with pytest.raises(InputError, match="top_p=7"):
        SamplingDefaults.of(GenerationConfig(top_p=7.0))
