"""Loaded models hold the kernels' layout and nothing else; what they save is what was stored."""

from __future__ import annotations

import pytest
import torch
from helpers import with_decoded_weights
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import bitstrata
from bitstrata.kernels import registry
from bitstrata.kernels.cpu import missing
from bitstrata.nn import PlaneLinear

pytestmark = pytest.mark.skipif(bool(missing), reason="the native kernels are not built")
NAMES = ["llama", "gpt2", "opt"]


@pytest.fixture(autouse=True)
def not_forced(monkeypatch):
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, PlaneLinear)]


def tensors_on_disk(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  (not a dict)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "load", [bitstrata.load, AutoModelForCausalLM.from_pretrained], ids=["load", "from_pretrained"]
)
def test_every_layer_is_prepared_and_holds_nothing_twice(name, load, quantized):
    layers = layers_of(load(quantized(name)[2]))
    assert layers
    for layer in layers:
        assert layer.packed.layout != "stored"
        assert {key.partition("_")[0] for key, _ in layer.named_buffers()} == {"packed", "weight"}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_prepared_model_saves_is_what_was_stored(name, quantized, tmp_path):
    out = quantized(name)[2]
    model = bitstrata.load(out)
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]]), bits=2)
    model.save_pretrained(tmp_path / "again")
    before, after = tensors_on_disk(out), tensors_on_disk(tmp_path / "again")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype, key
        assert torch.equal(after[key], tensor), key
    assert all(layer.packed.layout != "stored" for layer in layers_of(model)), "saving leaves the model as it was"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_changing_dtype_after_loading_equals_loading_in_that_dtype(dtype, quantized):
    out = quantized("llama")[2]
    ids = torch.tensor([[3, 4, 5, 6]])
    moved, loaded = bitstrata.load(out).to(dtype), bitstrata.load(out, dtype=dtype)
    with torch.no_grad():
        for bits in (2, 8):
            assert torch.equal(moved(ids, bits=bits).logits, loaded(ids, bits=bits).logits)
    assert all(layer.packed.layout != "stored" for layer in layers_of(moved))


def test_a_forced_kernel_counts_when_a_model_is_loaded(quantized, monkeypatch):
    original, _, out = quantized("llama")
    ids = torch.tensor([[3, 4, 5, 6]])
    native = bitstrata.load(out)
    with torch.no_grad():
        before = {bits: native(ids, bits=bits).logits for bits in (2, 8)}
        monkeypatch.setenv(registry.ENVIRONMENT, "reference")
        plain = bitstrata.load(out)
        assert all(layer.packed.layout == "stored" for layer in layers_of(plain))
        for bits, logits in before.items():
            assert torch.equal(native(ids, bits=bits).logits, logits)
            expected = plain(ids, bits=bits).logits
            assert torch.dist(logits, expected) < 0.05 * expected.norm()  # int8 activations and byte levels
            twin = with_decoded_weights(original, plain, bits)
            torch.testing.assert_close(twin(ids).logits, expected)
