"""Whatever mode the caller has put torch into, what is computed is what is computed without."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama, tiny_text, tiny_tokenizer
from torch_states import STATES

import bitstrata
from bitstrata.nn import bits_state

IDS = torch.tensor([[0, 5, 9, 13, 17, 21, 25]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("states") / "out"
    source = tiny_llama(tmp_path_factory.mktemp("source"))
    bitstrata.quantize(source, out, method="rtn", bits="2-4", group_size=32)
    return out


@pytest.fixture(scope="module")
def model(folder):
    return bitstrata.load(folder)


@pytest.fixture(params=STATES)
def state(request):
    return request.param, STATES[request.param]


def assert_same(found, expected, name):
    """Under autocast the parts that stay dense are in bf16: that is what the caller asked for."""
    if name == "autocast":
        torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.15)
    else:
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", [2, 4, {"rows": [2, 4]}], ids=["2", "4", "rows"])
def test_forward(model, state, bits):
    name, enter = state
    asked = torch.tensor(bits["rows"]) if isinstance(bits, dict) else bits
    ids = IDS.repeat(2, 1)
    with torch.no_grad():
        expected = model(ids, bits=asked).logits
    with enter():
        found = model(ids, bits=asked).logits
        with bitstrata.use_bits(model, asked):
            again = model(ids).logits
    assert_same(found.detach(), expected, name)
    assert torch.equal(again, found)
    assert bits_state(model).value == 4


def test_loading(folder, model, state):
    _, enter = state
    with torch.no_grad():
        expected = model(IDS, bits=3).logits
        with enter():
            loaded = bitstrata.load(folder, dtype=torch.float32)
        assert torch.equal(loaded(IDS, bits=3).logits, expected)


def test_generate(model, state):
    _, enter = state
    settings = {"bits": 3, "max_new_tokens": 8, "tokenizer": tiny_tokenizer()}
    expected = bitstrata.generate(model, "there is a", **settings)
    with enter():
        found = bitstrata.generate(model, "there is a", **settings)
    assert found.text == expected.text
    assert expected.tokens == 8


@pytest.mark.parametrize("arithmetic", [None, "exact"])
def test_evaluate(model, state, arithmetic, tmp_path):
    _, enter = state
    text = tiny_text(tmp_path / "text.txt", documents=2, words=10)
    settings = {"tokenizer": tiny_tokenizer(), "reference": model, "arithmetic": arithmetic}
    expected = bitstrata.evaluate(model, text, **settings)
    with enter():
        found = bitstrata.evaluate(model, text, **settings)
    assert found == expected
