"""A model of a given shape with random planes: as fast as a real one, built without downloading or solving anything.

Layers are made one at a time in the kernels' own layout, so memory is the model's and no more.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from ..models import attach, discover, find_head
from ..models.discover import set_submodule
from ..models.experts import active_experts, experts_of, split_experts
from ..nn import BitsState, PlaneEmbedding, PlaneLinear, TiedHead
from ..planes import PlaneWeight, Scales, group_count, words_per_row
from ..planes.weights import byte_unit, scales_kind
from ..solvers.grouping import make_affine

# name -> config of a well-known model's shape
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}


ROPE = {"rope_type": "default", "rope_theta": 500000.0}


def shape_config(name: str) -> PreTrainedConfig:
    """The config of SHAPES[name]."""
    return LlamaConfig(max_position_embeddings=8192, rope_parameters=ROPE, **SHAPES[name])


def random_weight(
    out_features: int,
    in_features: int,
    bits: tuple[int, ...],
    group_size: int,
    generator: torch.Generator,
    kind: str = "affine",
) -> PlaneWeight:
    """Planes of coin tosses, and scales that fall by half from plane to plane as in a trained weight.

    They are on the generator's device. kind: "affine" or "affine8".
    """
    words, device = words_per_row(in_features), generator.device
    last = in_features % 32
    planes = []
    for _ in range(max(bits)):
        size = (out_features, words)
        plane = torch.randint(-(2**31), 2**31, size, dtype=torch.int32, generator=generator, device=device)
        if last:
            plane[:, -1] &= (1 << last) - 1  # padding bits are 0
        planes.append(plane)
    groups = group_count(in_features, group_size)
    scales: dict[int, Scales] = {}
    for value in bits:
        step = in_features**-0.5 * torch.exp2(-torch.arange(value, dtype=torch.float32, device=device)).view(-1, 1, 1)
        scale = step * (0.75 + 0.5 * torch.rand(value, out_features, groups, generator=generator, device=device))
        offset = 0.1 * step[0] * torch.randn(out_features, groups, generator=generator, device=device)
        unit = None
        if scales_kind(kind, value) == "affine8":  # a plane's bytes count steps half as large as those before it
            unit = byte_unit(torch.maximum(scale[0], offset.abs()).amax(1))
        scales[value] = make_affine(scale, offset, unit)
    return PlaneWeight(tuple(planes), scales, in_features, group_size)


def random_model(
    config: PreTrainedConfig,
    bits: tuple[int, ...],
    *,
    group_size: int = 128,
    head_bits: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    blocks: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    kind: str = "affine",
) -> PreTrainedModel:
    """A causal model of this shape whose linears in the decoder blocks run from random planes at any of `bits`.

    Args:
        head_bits: planes for the output head and the embedding as well, at this precision; else they stay in `dtype`.
        blocks: build only as many decoder blocks.
        kind: of the scales in the blocks, "affine" or "affine8".
    """
    model = skeleton(config, blocks, dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    linears = discover(model).linears
    head = find_head(model) if head_bits is not None else ()
    state = BitsState({linear.name: bits for linear in linears}, fixed={layer.name: head_bits or 0 for layer in head})
    experts = experts_of((linear.name for linear in linears), model)
    for linear in linears:
        weight = random_weight(linear.out_features, linear.in_features, bits, group_size, generator, kind)
        layer = PlaneLinear.from_weight(weight, name=linear.name, state=state, dtype=dtype)
        if linear.name in experts:
            count = experts[linear.name][1]
            layer.share = (active_experts(config, count) or count) / count
        layer.pack()
        set_submodule(model, linear.name, layer)
    if head_bits is not None:
        _put_head(model, head_bits, group_size, dtype, generator, state)
    _fill(model, dtype, generator)
    return attach(model.eval())


def _put_head(
    model: PreTrainedModel,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    state: BitsState,
) -> None:
    """Random planes for the embedding, and for the head unless it is tied and shares them."""
    for layer in find_head(model):
        weight = random_weight(layer.out_features, layer.in_features, (bits,), group_size, generator)
        if layer.role == "embedding":
            embedding = PlaneEmbedding.from_weight(weight, state=state, dtype=dtype)
            set_submodule(model, layer.name, embedding)
            if layer.tied is not None:
                set_submodule(model, layer.tied, TiedHead(embedding))
        else:
            linear = PlaneLinear.from_weight(weight, name=layer.name, state=state, dtype=dtype)
            set_submodule(model, layer.name, linear)


def dense_model(
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    blocks: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The same model with ordinary random weights."""
    model = skeleton(config, blocks, dtype, device)
    _fill(model, dtype, torch.Generator(device).manual_seed(seed))
    model.eval().requires_grad_(False)
    return model


def skeleton(
    config: PreTrainedConfig, blocks: int | None, dtype: torch.dtype, device: torch.device | str
) -> PreTrainedModel:
    """The model of `config`, of only `blocks` decoder blocks if given.

    Its experts are linears. Its parameters are on meta, its buffers, such as rotary frequencies, on `device`.
    """
    config = copy.deepcopy(config)
    if blocks is not None:
        config.num_hidden_layers = blocks
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    split_experts(model)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model


def _fill(model: nn.Module, dtype: torch.dtype, generator: torch.Generator) -> None:
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                value = random_parameter(parameter.shape, dtype, generator)
                made[id(parameter)] = nn.Parameter(value, requires_grad=False)
            module._parameters[key] = made[id(parameter)]


def random_parameter(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """What a parameter of this shape starts as: ones for a vector (a norm), else small random numbers."""
    value = torch.empty(shape, dtype=dtype, device=generator.device)
    return value.fill_(1) if len(shape) == 1 else value.normal_(0, 0.02, generator=generator)
