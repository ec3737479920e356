"""What a model's modules hold in planes, whichever kind of module it is."""

from __future__ import annotations

import torch
from torch import nn

from .embedding import TiedHead
from .fused import TOGETHER, FusedGroup
from .linear import PlaneLinear


def multiplied_layers(model: nn.Module) -> list[PlaneLinear | TiedHead]:
    """The layers of `model` that multiply by planes: what every token reads."""
    return [module for module in model.modules() if isinstance(module, (PlaneLinear, TiedHead))]


def steady_rows(model: nn.Module, dtype: torch.dtype) -> int | None:
    """Rows up to which every layer's kernel uses the arithmetic of one row alone; None if it always does.

    A call of more rows may round differently, each row the same whatever the others are.
    """
    held = [layer if isinstance(layer, PlaneLinear) else layer.embedding for layer in multiplied_layers(model)]
    limits = [module.packed.kernel_for(1, dtype).steady(dtype) for module in held]
    return min((limit for limit in limits if limit is not None), default=None)


def fuse(model: nn.Module) -> int:
    """Let sibling layers of `model` that read the same input share calls; returns how many groups there are."""
    groups = 0
    for module in model.modules():
        for names in TOGETHER:
            members = [child for name in names if isinstance(child := getattr(module, name, None), PlaneLinear)]
            shapes = {(child.in_features, child.group_size, child.kind, child.bits) for child in members}
            if len(members) > 1 and len(shapes) == 1:
                group = FusedGroup(members)
                for child in members:
                    child.fused = group
                groups += 1
    return groups
