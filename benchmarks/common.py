"""What several scripts need: a checkpoint of a known shape with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedConfig

from bitstrata.benchmark.random_model import random_parameter, random_weight, skeleton
from bitstrata.checkpoint import (
    LayerSpec,
    QuantizationSpec,
    TensorEntry,
    entries_of,
    format_version,
    merge_experts,
    write_checkpoint,
)
from bitstrata.models import discover
from bitstrata.models.experts import active_experts, experts_of


def random_checkpoint(
    folder: Path,
    config: PreTrainedConfig,
    bits: tuple[int, ...],
    *,
    group_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    blocks: int | None = None,
    seed: int = 0,
) -> None:
    """Write what `random_model` makes as a checkpoint; all of it is in memory meanwhile. The head stays in `dtype`."""
    model, generator = skeleton(config, blocks, dtype, "cpu"), torch.Generator().manual_seed(seed)
    layers, entries = {}, []
    linears = discover(model).linears
    experts = experts_of((linear.name for linear in linears), model)
    for linear in linears:
        stored, count = experts.get(linear.name, (linear.name, None))
        layers[stored] = LayerSpec(
            in_features=linear.in_features,
            out_features=linear.out_features,
            bias=linear.bias,
            experts=count,
            active=None if count is None else active_experts(config, count),
        )
    spec = QuantizationSpec(
        format_version=format_version(layers.values()),
        method="random",
        bits=list(bits),
        group_size=group_size,
        layers=layers,
    )
    for linear in linears:
        weight = random_weight(linear.out_features, linear.in_features, bits, group_size, generator)
        entries += entries_of(linear.name, weight)
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") in spec.linears:
            entries.append(TensorEntry.of(name, torch.empty(0, dtype=dtype)))
        else:
            entries.append(TensorEntry.of(name, random_parameter(parameter.shape, dtype, generator)))
    model.config.architectures = [type(model).__name__]
    described = model.config.to_dict() | {"quantization_config": spec.model_dump(exclude_none=True)}
    write_checkpoint(folder, described, merge_experts(spec, entries))
