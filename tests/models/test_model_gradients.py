"""Prompt tuning, saliency, adapters: gradients through a whole quantized model are those of its decoded weights."""

from __future__ import annotations

import copy

import pytest
import torch

import bitstrata
from bitstrata.kernels import registry
from bitstrata.kernels.cpu import missing
from bitstrata.nn import PlaneLinear
from bitstrata.planes import decode


@pytest.mark.skipif(bool(missing), reason="the native kernels are not built")
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("length", [1, 5, 24])
def test_gradients_of_a_soft_prompt(quantized, bits, length, seed, monkeypatch):
    monkeypatch.setenv(registry.ENVIRONMENT, "scalar-exact")
    original, _, out = quantized("llama")
    model, dense = bitstrata.load(out), copy.deepcopy(original).double()
    layers = dict(model.named_modules())
    for name, layer in dense.named_modules():
        if isinstance(layers.get(name), PlaneLinear):
            layer.weight.data = decode(layers[name].plane_weight(), bits, torch.float64)
    prompt = torch.randn(2, length, model.config.hidden_size, generator=torch.Generator().manual_seed(seed))

    def gradient(model, prompt, **options):
        prompt = prompt.requires_grad_()
        logits = model(inputs_embeds=prompt, use_cache=False, **options).logits
        return torch.autograd.grad(logits.double().log_softmax(-1)[..., 3].sum(), prompt)[0].double()

    found, expected = gradient(model, prompt.clone(), bits=bits), gradient(dense, prompt.double())
    assert (found - expected).norm() <= 1e-4 * expected.norm()
