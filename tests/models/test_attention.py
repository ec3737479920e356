"""Grouped attention for one new token: the same numbers as transformers' sdpa, and used where it should be."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bitstrata.models.attention import NAME, grouped_sdpa, use_grouped_sdpa

HEADS, SHARED, WIDTH = 6, 2, 8


class Module(nn.Module):
    num_key_value_groups = HEADS // SHARED
    is_causal = True


def tensors(length, context, seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(3, HEADS, length, WIDTH, generator=generator)
    key, value = torch.randn(2, 3, SHARED, context, WIDTH, generator=generator)
    return query, key, value


@pytest.mark.parametrize("scaling", [None, 0.25])
@pytest.mark.parametrize("context", [1, 7, 64])
def test_one_token_attends_as_with_sdpa(context, scaling, seed, monkeypatch):
    query, key, value = tensors(1, context, seed)
    expected, _ = sdpa_attention_forward(Module(), query, key, value, None, scaling=scaling)
    monkeypatch.setattr("bitstrata.models.attention.sdpa", None)  # it must not come to this
    found, weights = grouped_sdpa(Module(), query, key, value, None, scaling=scaling)
    assert weights is None
    assert found.shape == expected.shape == (3, 1, HEADS, WIDTH)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("length", [1, 4])
def test_masks_and_longer_queries_are_passed_on(length, seed):
    query, key, value = tensors(length, 9, seed)
    mask = torch.rand(3, 1, length, 9, generator=torch.Generator().manual_seed(seed)) < 0.7
    mask[..., 0] = True
    for chosen in (mask, None) if length > 1 else (mask,):
        expected, _ = sdpa_attention_forward(Module(), query, key, value, chosen)
        found, _ = grouped_sdpa(Module(), query, key, value, chosen)
        assert torch.equal(found, expected)


def tiny(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=SHARED, max_position_embeddings=64, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_a_model_generates_the_same_tokens():
    model, ids = tiny(), torch.arange(10).view(2, 5)
    plain = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert use_grouped_sdpa(model)
    assert model.config._attn_implementation == NAME
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0), plain)


def test_other_attention_is_left_alone():
    model = tiny()
    model.set_attn_implementation("eager")
    assert not use_grouped_sdpa(model)
    assert model.config._attn_implementation == "eager"


def test_the_name_is_not_saved(tmp_path):
    model = tiny()
    use_grouped_sdpa(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
