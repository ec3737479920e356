"""Architectures in the engine: the tokens of each model's own generate, or a refusal that says why."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.mark.parametrize("name", [name for name in architectures.CONFIGS if "-tied" not in name])
def test_tokens_are_those_of_generate(name, tmp_path, seed, exact_kernel):
    model = load(name, tmp_path)
    chance = random.Random(seed)
    requests = []
    for length in (1, 5, 16, 17, 30, 40):  # the sliding windows are 16
        prompt = [chance.randrange(3, 96) for _ in range(length)]
        requests.append((prompt, chance.choice((2, 3, 8)), chance.randrange(5, 20)))
    expected = []
    for prompt, bits, new in requests:
        ids = torch.tensor([prompt])
        settings = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False}
        expected.append(model.generate(ids, bits=bits, max_new_tokens=new, **settings)[0, len(prompt) :].tolist())
    with Engine(model, max_batch_tokens=40) as engine:
        handles = [engine.submit(Request(prompt, bits=bits, max_new_tokens=new)) for prompt, bits, new in requests]
        assert [handle.result(120) for handle in handles] == expected


def test_layers_that_are_not_plain_attention_are_refused(tmp_path):
    model = load("llama", tmp_path)
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(UsageError, match="chunked_attention"):
        Engine(model)


def test_a_model_whose_logits_differ_in_batches_is_refused(tmp_path):
    model = load("llama", tmp_path)
    attention = model.model.layers[0].self_attn
    plain = attention.forward

    def forward(*args, **kwargs):  # as if positions did not reach the keys
        if "bitstrata_batch" in kwargs:
            kwargs["position_embeddings"] = tuple(torch.zeros_like(part) for part in kwargs["position_embeddings"])
        return plain(*args, **kwargs)

    attention.forward = forward
    with pytest.raises(UsageError, match="differ from its own"):
        Engine(model)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_that_depend_on_the_longest_of_a_batch_end_where_they_would(tmp_path, kind):
    model = load("llama", tmp_path)
    model.config.rope_parameters = {"rope_type": kind, "original_max_position_embeddings": 32}
    with Engine(model) as engine:
        assert engine.limits.context == 32
