"""`model.bits` and `bitstrata.layers`: what runs by default, and what plans are made of."""

from __future__ import annotations

import inspect

import pytest
import torch

import bitstrata
from bitstrata.errors import UnsupportedBitsError, UsageError

IDS = torch.tensor([[3, 9, 27, 81, 50], [4, 8, 16, 32, 64]])


@pytest.fixture
def out(quantized):
    return quantized("llama")[2]


@torch.no_grad()
def test_setting_bits_switches_what_runs_without_them(out):
    model = bitstrata.load(out)
    expected = {bits: model(IDS, bits=bits).logits for bits in (2, 3, 8)}
    assert model.bits == 8
    model.bits = 2
    assert model.bits == 2
    assert torch.equal(model(IDS).logits, expected[2])
    with bitstrata.use_bits(model, 3):
        assert model.bits == 3
    plan = dict.fromkeys(bitstrata.layers(model), 3)
    model.bits = plan
    assert model.bits == plan
    assert torch.equal(model(IDS).logits, expected[3])
    with pytest.raises(UnsupportedBitsError, match="bits=7"):
        model.bits = 7
    with pytest.raises(UsageError, match="does not fit"):
        model.bits = {}
    assert model.bits == plan
    model.bits = None
    assert model.bits == 8


@torch.no_grad()
def test_a_list_has_one_entry_a_sequence(out):
    model = bitstrata.load(out)
    plan = {name: (2, 8)[index % 2] for index, name in enumerate(bitstrata.layers(model))}
    logits = model(IDS, bits=[plan, 3]).logits
    for row, bits in enumerate((plan, 3)):
        torch.testing.assert_close(logits[row], model(IDS, bits=bits).logits[row], rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="do not fit"):
        model(IDS, bits=[plan, 3, 3])
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(IDS, bits=[2, 8], num_beams=2, **settings),
        model.generate(IDS, bits=torch.tensor([2, 8]), num_beams=2, **settings),
    )


def test_layers_are_those_that_a_plan_names(out):
    whole, prefix = bitstrata.load(out), bitstrata.load(out, max_bits=3)
    layers = bitstrata.layers(whole)
    assert set(layers.values()) == {(2, 3, 8)}
    assert bitstrata.layers(prefix) == dict.fromkeys(layers, (2, 3))
    paged = bitstrata.load(out, plan=2)
    assert bitstrata.layers(paged) == layers, "what the files have, which is what a resize can have"
    assert dict(paged.bits) == dict.fromkeys(layers, 2)
    with pytest.raises(UsageError, match="no quantized layers"):
        bitstrata.layers(torch.nn.Linear(3, 3))


def test_methods_of_a_loaded_model_say_what_they_take(out):
    model = bitstrata.load(out)
    assert "input_ids" in inspect.signature(model.forward).parameters
    assert "bits" in inspect.signature(model.forward).parameters
    assert {"generation_config", "bits", "draft_bits"} <= inspect.signature(model.generate).parameters.keys()
    assert type(model).__name__ == "LlamaForCausalLM"
