"""Finding and replacing the modules that a checkpoint names."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..checkpoint import LayerSpec
from ..errors import CheckpointError
from .discover import linear_info


def submodule(model: nn.Module, name: str) -> Any:
    """The submodule called `name`. Raises CheckpointError if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"the checkpoint quantizes {name}, which {type(model).__name__} lacks") from None


def linear_of(model: nn.Module, name: str, layer: LayerSpec) -> Any:
    """The linear called `name`. Raises CheckpointError unless it has the sizes of `layer`."""
    module = submodule(model, name)
    info = linear_info(name, module, 0)
    expected = (layer.in_features, layer.out_features, layer.bias)
    if info is None or (info.in_features, info.out_features, info.bias) != expected:
        bias = "a" if layer.bias else "no"
        raise CheckpointError(
            f"{name}: the checkpoint has [{layer.out_features}, {layer.in_features}] and {bias} bias, "
            f"the model has {module}"
        )
    return module


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
