"""Architectures in the engine: the tokens of each model's own generate, also of those that cannot share passes."""

from __future__ import annotations

import copy
import random
import sys
from pathlib import Path

import pytest
import sweep
import torch
from tiny_models import save

import bitstrata
from bitstrata.errors import UsageError
from bitstrata.runtime import Engine, Request

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import architectures


def load(name, folder):
    architectures.save(name, folder / "source")
    settings = {"bits": "2,3,8", "method": "rtn", "group_size": 32}
    bitstrata.quantize(folder / "source", folder / "out", **settings)
    return bitstrata.load(folder / "out", dtype=torch.float32)


@pytest.mark.parametrize("batched", [True, False])
def test_log_probabilities_of_prompts_are_the_models_own(tmp_path, seed, exact_kernel, caplog, batched):
    model = load("llama", tmp_path) if batched else not_batched(tmp_path, caplog)
    chance = random.Random(seed)
    prompts = [[chance.randrange(3, 96) for _ in range(length)] for length in (1, 2, 16, 17, 45)]
    expected = []
    for bits, prompt in zip((2, 3, 8, 2, 3), prompts, strict=True):
        with torch.no_grad():
            values = model(torch.tensor([prompt]), bits=bits).logits[0].float().log_softmax(-1)
        expected.append([float(values[place, token]) for place, token in enumerate(prompt[1:])])
    with Engine(model, max_requests=3, max_batch_tokens=40) as engine:
        handles = [
            engine.submit(Request(prompt, bits=bits, max_new_tokens=2, prompt_logprobs=1))
            for bits, prompt in zip((2, 3, 8, 2, 3), prompts, strict=True)
        ]
        found = [next(iter(handle.events(120))).tokens for handle in handles]
        new = [handle.result(120) for handle in handles]
    for tokens, prompt, values, bits, made in zip(found, prompts, expected, (2, 3, 8, 2, 3), new, strict=True):
        assert [token.id for token in tokens] == prompt
        assert [token.logprob for token in tokens[1:]] == pytest.approx(values, abs=1e-3)
        assert made == by_generate(model, prompt, bits, 2)


@pytest.mark.parametrize("name", [name for name in architectures.CONFIGS if "-tied" not in name])
def test_tokens_are_those_of_generate(name, tmp_path, seed, exact_kernel):
    model = load(name, tmp_path)
    chance = random.Random(seed)
    requests = []
    for length in (1, 5, 16, 17, 30, 40):  # the sliding windows are 16
        prompt = [chance.randrange(3, 96) for _ in range(length)]
        requests.append((prompt, chance.choice((2, 3, 8)), chance.randrange(5, 20)))
    expected = [by_generate(model, *request) for request in requests]
    with Engine(model, max_batch_tokens=40) as engine:
        handles = [engine.submit(Request(prompt, bits=bits, max_new_tokens=new)) for prompt, bits, new in requests]
        assert [handle.result(120) for handle in handles] == expected


def by_generate(model, prompt, bits, new):
    ids = torch.tensor([prompt])
    settings = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False}
    return model.generate(ids, bits=bits, max_new_tokens=new, **settings)[0, len(prompt) :].tolist()


def not_batched(folder, caplog):
    """A model with a kind of layer that no batch takes."""
    model = load("llama", folder)
    model.config.layer_types = ["full_attention"] * model.config.num_hidden_layers
    model.config.layer_types[-1] = "chunked_attention"
    model.config.attention_chunk_size = 256
    model.config.max_position_embeddings = 256
    return model


def test_texts_that_cannot_share_passes_run_one_at_a_time(tmp_path, seed, exact_kernel, caplog):
    """At bits of their own, cancellations and requests that come later included, with the tokens of generate."""
    model = not_batched(tmp_path, caplog)
    chance = random.Random(seed)
    requests = [
        ([chance.randrange(3, 96) for _ in range(length)], chance.choice((2, 3, 8)), chance.randrange(5, 20))
        for length in (1, 5, 16, 17, 30, 40, 50)
    ]
    expected = [by_generate(model, *request) for request in requests]
    with Engine(model, max_requests=3, max_batch_tokens=40) as engine:
        gone = engine.submit(Request(requests[0][0], bits=8, max_new_tokens=120))
        handles = [engine.submit(Request(prompt, bits=bits, max_new_tokens=new)) for prompt, bits, new in requests[:4]]
        gone.cancel()
        assert [handle.result(120) for handle in handles] == expected[:4]
        with pytest.raises(UsageError, match="is running this model"):
            Engine(model)
        handles = [engine.submit(Request(prompt, bits=bits, max_new_tokens=new)) for prompt, bits, new in requests[4:]]
        assert [handle.result(120) for handle in handles] == expected[4:]
        assert engine.stats().cache_bytes > 0
    assert caplog.text.count("chunked_attention cannot run in an engine's batches; each text runs by itself") == 1
    assert by_generate(model, *requests[3]) == expected[3]  # the model is free again


@pytest.mark.parametrize("name", ["qwen3_5", "falcon_h1", "mamba2"])
def test_recurrent_layers_run_alone_and_go_on_where_they_were(name, tmp_path, seed, exact_kernel, caplog):
    save(sweep.build(name)[0], tmp_path / "source")
    bitstrata.quantize(tmp_path / "source", tmp_path / "out", bits="2,8", method="rtn", group_size=16)
    model = bitstrata.load(tmp_path / "out", dtype=torch.float32)
    size, chance = model.config.get_text_config().vocab_size, random.Random(seed)
    prompts = [[chance.randrange(3, size) for _ in range(length)] for length in (1, 16, 17, 30)]
    expected = [by_generate(model, prompt, bits, 6) for prompt in prompts for bits in (2, 8)]
    with Engine(model) as engine:
        handles = [
            engine.submit(Request(prompt, bits=bits, max_new_tokens=6, ignore_eos=True))
            for prompt in prompts
            for bits in (2, 8)
        ]
        made = [handle.result(120) for handle in handles]
        assert [one[: len(other)] for one, other in zip(made, expected, strict=True)] == expected
        longer = prompts[-1] + made[-1] + [chance.randrange(3, size) for _ in range(20)]
        goes_on = engine.submit(Request(longer, bits=8, max_new_tokens=6))
        found = goes_on.result(120)
        assert goes_on.reused_tokens == 35
    assert found == by_generate(model, longer, 8, 6)
    assert "each text runs by itself" in caplog.text


def test_a_chat_that_runs_alone_goes_on_where_it_was(tmp_path, seed, exact_kernel, caplog):
    """A text that begins with all of an earlier one takes up its cache; one that leaves it half way does not."""
    model = not_batched(tmp_path, caplog)
    chance = random.Random(seed)
    prompt = [chance.randrange(3, 96) for _ in range(60)]
    twin = copy.deepcopy(model)
    with Engine(model) as engine:
        first = engine.submit(Request(prompt, bits=3, max_new_tokens=8, ignore_eos=True))
        first.result(120)
        longer = prompt + first.tokens + [chance.randrange(3, 96) for _ in range(30)]
        second = engine.submit(Request(longer, bits=3, max_new_tokens=8))
        assert second.result(120) == by_generate(twin, longer, 3, 8)
        assert second.reused_tokens == len(prompt) + 7  # the last token was never fed
        for other, bits in ((longer[:50] + [5] * 30, 3), (longer + [5] * 30, 2)):
            third = engine.submit(Request(other, bits=bits, max_new_tokens=8))
            assert third.result(120) == by_generate(twin, other, bits, 8)
            assert third.reused_tokens == 0


def test_prompts_are_fed_whole_where_parts_compute_something_else(tmp_path, seed, exact_kernel, caplog):
    """As layers do whose recurrent path takes one token or a beginning."""
    model = not_batched(tmp_path, caplog)
    attention, chance = model.model.layers[0].self_attn, random.Random(seed)
    plain, fed = attention.forward, []

    def forward(hidden_states, *args, **kwargs):
        fed.append(hidden_states.shape[1])
        past = kwargs["past_key_values"].get_seq_length(0) if kwargs.get("past_key_values") is not None else 0
        output, *rest = plain(hidden_states, *args, **kwargs)
        return (output * 3 if past and hidden_states.shape[1] > 1 else output, *rest)

    attention.forward = forward
    prompt = [chance.randrange(3, 96) for _ in range(90)]
    expected = by_generate(model, prompt, 3, 8)
    with Engine(model, max_batch_tokens=40) as engine:
        fed.clear()
        for _ in range(2):
            handle = engine.submit(Request(prompt, bits=3, max_new_tokens=8))
            assert handle.result(120) == expected
            assert handle.reused_tokens == 0
    assert fed == [90, *[1] * 7] * 2


def test_a_model_whose_logits_differ_in_batches_runs_its_texts_alone(tmp_path, caplog, exact_kernel):
    model = load("llama", tmp_path)
    attention = model.model.layers[0].self_attn
    plain = attention.forward

    def forward(*args, **kwargs):  # as if positions did not reach the keys
        if "bitstrata_batch" in kwargs:
            kwargs["position_embeddings"] = tuple(torch.zeros_like(part) for part in kwargs["position_embeddings"])
        return plain(*args, **kwargs)

    attention.forward = forward
    expected = by_generate(model, [5, 6, 7], 3, 8)
    with Engine(model) as engine:
        assert engine.submit(Request([5, 6, 7], bits=3, max_new_tokens=8)).result(60) == expected
    assert "differ from its own" in caplog.text


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_that_depend_on_the_longest_of_a_batch_end_where_they_would(tmp_path, kind):
    model = load("llama", tmp_path)
    model.config.rope_parameters = {"rope_type": kind, "original_max_position_embeddings": 32}
    with Engine(model) as engine:
        assert engine.limits.context == 32
