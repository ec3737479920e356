"""What every import reads: a model of another program as layers on grids or in planes, and tensors that stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoint import TensorEntry
from ..models.compat import new_model
from ..models.config import causal_class
from ..planes import PlaneWeight
from .uniform import Coefficients, Grid


@dataclass(frozen=True)
class Layer:
    """A quantized layer of a source.

    bits: of its weights, ascending; several where it is nested. read: its numbers, when they are due.
    role, tied: as in LayerSpec.
    """

    bits: tuple[int, ...]
    read: Callable[[], Grid | Coefficients | PlaneWeight]
    bias: bool = False
    role: str | None = None
    tied: str | None = None


@dataclass(frozen=True)
class Source:
    """An opened model of another program.

    format: its name. layers, kept: quantized layers, and all other tensors, by the names of transformers.
    config: what config.json is to say. copy: puts the tokenizer and what else stands beside it into a folder.
    size: bytes of its weights.
    """

    format: str
    layers: Mapping[str, Layer]
    kept: Mapping[str, TensorEntry]
    config: dict[str, Any]
    dtype: torch.dtype
    copy: Callable[[Path], None]
    size: int
    settings: dict[str, Any] = field(default_factory=dict)


def skeleton_of(config: PreTrainedConfig) -> PreTrainedModel:
    """The model that `config` describes, on meta."""
    with init_empty_weights(include_buffers=False):
        kind, own = causal_class(config)
        model = new_model(kind, own)
    model.tie_weights()
    return model
