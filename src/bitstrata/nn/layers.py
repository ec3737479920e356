"""What a model's modules hold in planes, whichever kind of module it is."""

from __future__ import annotations

from torch import nn

from .embedding import TiedHead
from .linear import PlaneLinear
from .stored import PlaneModule


def multiplied_layers(model: nn.Module) -> list[PlaneLinear | TiedHead]:
    """The layers of `model` that multiply by planes: what every token reads."""
    return [module for module in model.modules() if isinstance(module, (PlaneLinear, TiedHead))]


def prepare_layers(model: nn.Module) -> None:
    """Put every weight of `model` into the layout of the kernel that runs here."""
    for module in model.modules():
        if isinstance(module, PlaneModule):
            module.prepare()
