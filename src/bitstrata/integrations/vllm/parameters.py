"""Stored tensors as parameters of vLLM's layers: vLLM's own loader reads and cuts them, and they become a Weight.

Parameters start as memory that nobody has written, so each says what was loaded into it: a tensor that a checkpoint
lacks is an error by name, never a layer of chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...kernels import Weight, pack, select
from ...kernels.registry import in_arithmetic
from ...memory import allocate
from ...planes.weights import PlaneWeight, make_scales
from .stored import Stored

Load = Callable[..., None]  # (parameter, what was read, which part of a joined layer)


class Loading:
    """Fills one parameter, and remembers of which parts it has them."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self.parts: set[Any] = set()

    def __call__(self, parameter: nn.Parameter, loaded: Tensor, part: Any = None) -> None:
        self._load(parameter, loaded, *(() if part is None else (part,)))
        self.parts.add(part)


def add_parameters(module: nn.Module, stored: Stored, rows: int, columns: int, load: Load) -> None:
    """Give `module` the tensors of `rows` output and `columns` input features of `stored`, to be filled by `load`."""
    for name, piece in stored.pieces(rows, columns).items():
        parameter = nn.Parameter(_empty(piece.shape, piece.dtype), requires_grad=False)
        attributes = {"output_dim": piece.output_dim, "weight_loader": Loading(load)}
        if piece.input_dim is not None:
            attributes["input_dim"] = piece.input_dim
        for key, value in attributes.items():
            setattr(parameter, key, value)
        module.register_parameter(name, parameter)

    for name in stored.dropped:
        unused = nn.Parameter(torch.empty(0), requires_grad=False)
        unused.weight_loader = _drop  # type: ignore[attr-defined]
        module.register_parameter(name, unused)


def _drop(parameter: nn.Parameter, loaded: Tensor, part: Any = None) -> None:
    """What other layers need and this one does not."""


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """On torch's default device; on a CPU so that its memory goes back to the system when the weight is packed."""
    if torch.get_default_device().type != "cpu":
        return torch.empty(shape, dtype=dtype)
    return allocate(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def add_guard(module: nn.Module, dtype: torch.dtype) -> None:
    """Give `module` an empty `weight`: checkpoints have one, and models ask it for their dtype."""
    guard = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    guard.weight_loader = _load_guard  # type: ignore[attr-defined]
    module.register_parameter("weight", guard)


def _load_guard(parameter: nn.Parameter, loaded: Tensor, part: Any = None) -> None:
    if loaded.numel():
        raise CheckpointError(f"a weight of shape {list(loaded.shape)} is stored where planes are")


@dataclass(frozen=True)
class Part:
    """Output features of a layer that follow each other, and the bits that they are needed at."""

    outputs: int
    bits: Collection[int]


def take_weights(
    module: nn.Module, stored: Stored, columns: int, dtype: torch.dtype, parts: Sequence[Part]
) -> list[Weight]:
    """The filled parameters of `module`, packed for the kernel that runs here: one weight a part.

    They leave the module. Raises CheckpointError for what was not loaded.
    """
    (weight,) = take_stored(module, stored, columns)
    kernel = steady_kernel(weight.planes[0].device.type, dtype)
    packed, start = [], 0
    for part in parts:
        own = weight if len(parts) == 1 else weight.outputs(start, start + part.outputs)
        kept = {bits: scales for bits, scales in own.scales.items() if bits in part.bits}
        packed.append(pack(replace(own, planes=own.planes[: max(kept)], scales=kept), dtype=dtype, kernel=kernel))
        start += part.outputs
    return packed


def take_stored(module: nn.Module, stored: Stored, columns: int) -> list[PlaneWeight]:
    """The filled parameters of `module` as they are, a weight for each expert or one; they leave the module.

    Raises CheckpointError for what was not loaded.
    """
    filled = dict(_filled(module, stored))
    for name in (*filled, *stored.dropped):
        delattr(module, name)
    each = (
        [filled]
        if stored.experts is None
        else [{name: tensor[expert] for name, tensor in filled.items()} for expert in range(stored.experts)]
    )
    weights = []
    for tensors in each:
        scales = {bits: make_scales(stored.kind, bits, tensors) for bits in stored.bits}
        planes = tuple(tensors[f"plane_{index}"] for index in range(max(stored.bits)))
        weights.append(PlaneWeight(planes, scales, columns, stored.group_size))
    return weights


def _filled(module: nn.Module, stored: Stored) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters(recurse=False):
        loading = getattr(parameter, "weight_loader", None)
        if not isinstance(loading, Loading):
            continue
        if len(loading.parts) != len(stored.names):
            raise CheckpointError(
                f"{name} of {stored.title}: read for {len(loading.parts)} of {len(stored.names)} layers",
                hint="copy or download the checkpoint again",
            )
        yield name, parameter.data


def steady_kernel(device: str, dtype: torch.dtype) -> str | None:
    """The kernel in which a row's result does not depend on how many others share its call; None for the best one.

    A server's batches change at every step, so nobody must notice who else is there.
    """
    kernel = select(device, dtype)
    if kernel.forced or kernel.steady(dtype) is None or kernel.activations == "exact":
        return None
    return in_arithmetic(kernel, "exact", 1, dtype).name
