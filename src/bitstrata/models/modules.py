"""Finding and replacing the modules that a checkpoint names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint import LayerSpec
from ..errors import CheckpointError
from ..nn import BitsOrPlan, PlaneLinear, TiedHead
from .discover import linear_info


def submodule(model: nn.Module, name: str) -> Any:
    """The submodule called `name`. Raises CheckpointError if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"the checkpoint quantizes {name}, which {type(model).__name__} lacks") from None


def local_name(model: PreTrainedModel, name: str) -> str:
    """What the layer that a checkpoint calls `name` is called in `model`.

    As transformers has it for tensors: an encoder alone lacks the prefix that it has inside a model with a head, and
    the other way round. A name that is not there either way stays as it is.
    """
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return name


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


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the inputs of `model` go: its own device; the CPU if its weights lie elsewhere and come when they run."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def bytes_per_token(model: PreTrainedModel, bits: BitsOrPlan | None) -> int:
    """Bytes of weights that one decoding step reads; of the input embedding only a row, which is left out.

    bits may be None for a model that is not quantized.
    """
    total = 0
    embedding = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, (PlaneLinear, TiedHead)):
            assert bits is not None
            total += module.bytes_read(bits)
        elif module is not embedding:  # a tied head is a module of its own
            total += sum(parameter.nbytes for parameter in module._parameters.values() if parameter is not None)
    return total
