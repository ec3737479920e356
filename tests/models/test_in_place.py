"""Into planes while transformers loads a model, and out of planes again."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitstrata
from bitstrata.demonstration.run import MODEL
from bitstrata.errors import ModelError, UsageError
from bitstrata.nn import PlaneLinear, PlaneModule
from bitstrata.planes import decode

TOKENS = torch.arange(5, 45)[None]


def test_quantized_while_loading_is_what_quantize_makes(tmp_path):
    config = bitstrata.BitstrataConfig(bits="2,4", group_size=64, skip="*down_proj")
    model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config, dtype=torch.float32)
    settings = {"bits": "2,4", "group_size": 64, "skip": "*down_proj", "preset": "fast"}
    bitstrata.quantize(MODEL, tmp_path / "out", **settings)
    expected = bitstrata.load(tmp_path / "out", dtype=torch.float32)
    other = dict(expected.named_modules())
    planes = {name: module for name, module in model.named_modules() if isinstance(module, PlaneLinear)}
    assert {name for name, module in other.items() if isinstance(module, PlaneLinear)} == set(planes)
    assert planes
    assert not any("down_proj" in name for name in planes)
    for name, module in planes.items():
        for bits in (2, 4):
            wanted = decode(other[name].plane_weight(), bits)
            assert torch.equal(decode(module.plane_weight(), bits), wanted)
    with torch.no_grad():
        for bits in (2, 4):
            assert torch.equal(model(TOKENS, bits=bits).logits, expected(TOKENS, bits=bits).logits)
    assert not model.training

    model.save_pretrained(tmp_path / "saved")
    again = bitstrata.load(tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(TOKENS, bits=2).logits, expected(TOKENS, bits=2).logits)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"preset": "best"}, "learns from a text"),
        ({"method": "gptq", "bits": 3}, "learns from a text"),
        ({"method": "none"}, "unknown method"),
        ({"bits": "0-9"}, "cannot be used"),
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"options": {"sped": 3}}, "no option 'sped'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_done_while_loading(settings, said):
    with pytest.raises(UsageError, match=said):
        bitstrata.BitstrataConfig(**settings)


def test_experts_are_named(quantized):
    _, source, _ = quantized("mixtral")
    with pytest.raises(ModelError, match="mixture of experts"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=bitstrata.BitstrataConfig(bits=3))


@pytest.mark.parametrize("head_bits", [None, 6])
def test_dequantized_it_is_an_ordinary_model(tmp_path, head_bits):
    bitstrata.quantize(MODEL, tmp_path / "out", bits="2-4", method="rtn", head_bits=head_bits)
    expected = bitstrata.load(tmp_path / "out", dtype=torch.float32)
    model = bitstrata.load(tmp_path / "out", bits=3, dtype=torch.float32)
    planes = sum(isinstance(module, PlaneModule) for module in model.modules())
    assert planes
    plain = model.dequantize()
    assert plain is model
    assert not any(isinstance(module, PlaneModule) for module in model.modules())
    with torch.no_grad():
        found, wanted = plain(TOKENS).logits, expected(TOKENS, bits=3).logits
        assert (found - wanted).abs().max() < 0.05 * wanted.std()  # kernels may round activations
    assert type(plain) is type(AutoModelForCausalLM.from_config(plain.config))
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == plain.config.tie_word_embeddings
    plain.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert not hasattr(again.config, "quantization_config")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, found)


def test_experts_are_not_dequantized_in_place(quantized):
    _, _, out = quantized("mixtral")
    with pytest.raises(UsageError, match="experts, which are not dequantized in place"):
        bitstrata.load(out).dequantize()
