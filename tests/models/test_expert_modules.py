"""Experts as linears compute what transformers' merged experts compute, whichever way those are merged."""

from __future__ import annotations

import copy
import importlib
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from bitstrata.models.experts import layout_of, parts_of, split_experts
from bitstrata.nn import Experts

E, T, K = 5, 13, 2
SIZES: dict[str, Any] = {
    "hidden_size": 12, "intermediate_size": 20, "moe_intermediate_size": 20, "num_local_experts": E, "num_experts": E,
    "n_routed_experts": E, "moe_num_experts": E, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16,
}  # fmt: skip
# transformers module . class: the ways in which experts are merged, and activations of their own
KINDS = {
    "mixtral": "mixtral.MixtralExperts",
    "gpt_oss": "gpt_oss.GptOssExperts",  # transposed, interleaved, biases, an activation of its own
    "aria_text": "aria.AriaExperts",  # transposed
    "nemotron_h": "nemotron_h.NemotronHExperts",  # no gate
    "deepseek_v4": "deepseek_v4.DeepseekV4Experts",  # limits
    "lfm2_moe": "lfm2_moe.Lfm2MoeExperts",
    "muse_spark_text": "muse_spark.MuseSparkExperts",  # a norm after each expert
}


def merged_experts(kind: str, seed: int) -> nn.Module:
    """A model with one module `experts` of random weights, as transformers has it."""
    folder, _, name = KINDS[kind].partition(".")
    try:
        made = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), name)
        settings = {**SIZES, "moe_hidden_size": 12} if kind == "muse_spark_text" else SIZES
        if kind == "muse_spark_text":
            settings["num_local_experts"] = E
        config = AutoConfig.for_model(kind, **settings)
    except (ImportError, AttributeError, ValueError):
        pytest.skip(f"this transformers has no {kind}")
    config._experts_implementation = "eager"
    torch.manual_seed(seed)
    module = made(config).eval().requires_grad_(False)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return nn.ModuleDict({"experts": module})


def routed(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, of each two of the experts but the last, and their scores."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, 12, generator=generator)
    chosen = torch.stack([torch.randperm(E - 1, generator=generator)[:K] for _ in range(T)])
    return x, chosen, torch.rand(T, K, generator=generator)


def split(model: nn.Module) -> Experts:
    """Its experts as linears, with the weights that they had."""
    before = {key: value.clone() for key, value in model.experts.named_parameters(recurse=False)}
    (layout,) = split_experts(model).values()  # type: ignore[arg-type]
    for key in layout.merged:
        for name, part in parts_of("experts", layout, key, key, tuple(before[key].shape)).items():
            owner, _, leaf = name.rpartition(".")
            value = part.of(before[key][part.expert])
            assert value.shape == part.shape == model.get_parameter(name).shape
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value.contiguous(), requires_grad=False))
    assert isinstance(model.experts, Experts)
    return model.experts


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_transformers_does(kind, seed):
    model = merged_experts(kind, seed)
    x, chosen, scores = routed(seed)
    expected = model["experts"](x, chosen, scores)
    experts = split(model)
    assert "0.down_proj.weight" in dict(experts.named_parameters())
    torch.testing.assert_close(experts(x, chosen, scores), expected, rtol=1e-5, atol=1e-5)
    one = torch.cat([experts(x[t : t + 1], chosen[t : t + 1], scores[t : t + 1]) for t in range(T)])
    torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_copies_and_pickles_compute_the_same(kind, seed):
    experts = split(merged_experts(kind, seed))
    x, chosen, scores = routed(seed)
    expected = experts(x, chosen, scores)
    for again in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert torch.equal(again(x, chosen, scores), expected)


def test_no_tokens_are_no_work(seed):
    experts = split(merged_experts("mixtral", seed))
    x, chosen, scores = (part[:0] for part in routed(seed))
    assert experts(x, chosen, scores).shape == (0, 12)


def test_tokens_keep_the_shape_that_they_came_in(seed):
    experts = split(merged_experts("mixtral", seed))
    x, chosen, scores = routed(seed)
    assert torch.equal(experts(x[None], chosen, scores)[0], experts(x, chosen, scores))


def test_presorted_experts_run_on_the_tokens_that_they_get(seed):
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    torch.manual_seed(seed)
    module = Llama4TextExperts(Llama4TextConfig(**SIZES)).requires_grad_(False)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(E, T, 12) * (torch.rand(E, T, 1) < 0.4)
    x[-1] = 0  # one that no token reaches
    expected = module(x.view(-1, 12))
    experts = split(nn.ModuleDict({"experts": module}))
    torch.testing.assert_close(experts(x.view(-1, 12)), expected, rtol=1e-5, atol=1e-5)


def test_experts_are_differentiable_in_inputs_and_weights(seed):
    model = merged_experts("mixtral", seed)
    x, chosen, scores = routed(seed)
    model["experts"].requires_grad_(True)
    expected = torch.autograd.grad(
        model["experts"](x.requires_grad_(), chosen, scores).square().sum(), [x, model["experts"].down_proj]
    )
    experts = split(model)
    weights = [experts.get_submodule(f"{expert}.down_proj").weight.requires_grad_() for expert in range(E)]
    found = torch.autograd.grad(experts(x, chosen, scores).square().sum(), [x, *weights], allow_unused=True)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert found[-1] is None  # no token chose it
    torch.testing.assert_close(torch.stack(found[1:-1]), expected[1][:-1], rtol=1e-4, atol=1e-4)


def test_what_is_merged_in_no_known_way_is_no_layout():
    class Experts3D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 3, 4))

    assert layout_of(Experts3D()) is None
    assert layout_of(nn.Linear(2, 2)) is None
