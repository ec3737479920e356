"""What a model's modules hold in planes, whichever kind of module it is."""

from __future__ import annotations

import torch
from torch import nn

from .embedding import TiedHead
from .linear import PlaneLinear


def multiplied_layers(model: nn.Module) -> list[PlaneLinear | TiedHead]:
    """The layers of `model` that multiply by planes: what every token reads."""
    return [module for module in model.modules() if isinstance(module, (PlaneLinear, TiedHead))]


def steady_rows(model: nn.Module, dtype: torch.dtype) -> int | None:
    """Rows up to which every layer's kernel uses the arithmetic of one row alone; None if it always does.

    A call of more rows may round differently, each row the same whatever the others are.
    """
    held = [layer if isinstance(layer, PlaneLinear) else layer.embedding for layer in multiplied_layers(model)]
    limits = [module.packed.kernel_for(1, dtype).steady_rows for module in held]
    return min((limit for limit in limits if limit is not None), default=None)
