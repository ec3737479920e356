"""All tensors of a model by the names that transformers has for them, given the weight of each of its linears."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..checkpoint import TensorEntry
from ..checkpoint.schema import SAFETENSORS_DTYPES
from ..errors import UsageError
from ..models.discover import local_name
from ..models.experts import Part, layout_of, parts_of
from .chosen import Chosen


def model_tensors(
    chosen: Chosen, dtype: torch.dtype, weight: Callable[[str], Tensor], kept: torch.dtype | None = None
) -> Iterator[TensorEntry]:
    """Every tensor of the model, read when it is written.

    Args:
        dtype: of the quantized weights, and of what `weight` gives for the name of a linear: [N, K].
        kept: of floating-point tensors that are not quantized; None for their own.
    """
    spec = chosen.reader.spec
    biases = {f"{name}.bias" for name, layer in spec.layers.items() if layer.experts is not None}
    for name in chosen.kept:
        if name not in biases:
            yield _kept(chosen, name, kept)
    modules = dict.fromkeys(name.rpartition(".")[0] for name, layer in spec.layers.items() if layer.experts is not None)
    for name, layer in spec.layers.items():
        if layer.experts is None:
            yield _linear(chosen, name, dtype, weight)
    for module in modules:
        yield from _experts(chosen, module, dtype, weight)


def _kept(chosen: Chosen, name: str, kept: torch.dtype | None) -> TensorEntry:
    stored, shape = chosen.reader.tensor_spec(name)
    own = SAFETENSORS_DTYPES[stored]
    dtype = kept if kept is not None and own.is_floating_point else own
    return TensorEntry(name, dtype, shape, lambda: chosen.reader.read(name).to(dtype))


def _linear(chosen: Chosen, name: str, dtype: torch.dtype, weight: Callable[[str], Tensor]) -> TensorEntry:
    layer = chosen.reader.spec.layers[name]
    place = chosen.skeleton.get_submodule(local_name(chosen.skeleton, name))
    if isinstance(place, Conv1D):
        shape = (layer.in_features, layer.out_features)
        return TensorEntry(f"{name}.weight", dtype, shape, lambda: weight(name).T)
    return TensorEntry(f"{name}.weight", dtype, (layer.out_features, layer.in_features), lambda: weight(name))


def _experts(chosen: Chosen, module: str, dtype: torch.dtype, weight: Callable[[str], Tensor]) -> Iterator[TensorEntry]:
    """The experts of `module`, merged as transformers has them: each parameter is one tensor in memory."""
    place = chosen.skeleton.get_submodule(local_name(chosen.skeleton, module))
    layout = layout_of(place)
    if layout is None:
        raise UsageError(f"the experts of {module} lie in a way that is not known here", hint="export another model")
    for key in layout.merged:
        shape = tuple(place.get_parameter(key).shape)
        parts = parts_of(module, layout, key, f"{module}.{key}", shape)
        yield TensorEntry(
            f"{module}.{key}",
            dtype,
            shape,
            lambda parts=parts, shape=shape: _merged(chosen, parts, shape, dtype, weight),  # type: ignore[misc]
        )


def _merged(
    chosen: Chosen,
    parts: Mapping[str, Part],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weight: Callable[[str], Tensor],
) -> Tensor:
    merged = torch.empty(shape, dtype=dtype)
    for full, part in parts.items():
        linear, _, end = full.rpartition(".")
        home, expert = chosen.reader.spec.linears[linear]
        value = weight(linear) if end == "weight" else chosen.reader.read(f"{home}.bias", expert)
        part.of(merged[part.expert]).copy_(value)
    return merged
