"""The operations as `torch.library` ops, so that compilers, tracers and transforms see one opaque node.

    bitstrata::linear     y = x @ W^T, every row at `bits` or row r at row_bits[r]
    bitstrata::product    x @ W^T or x @ W, W exactly as decoded: the linear map that `linear` stands for
    bitstrata::lookup     rows of W, chosen by index

They take a weight's tensors as lists, because a dispatcher schema has no structures: planes; the tensors of the scales
for `scales_bits`, one after the other; shape is [N, K, group_size]. They are defined through `torch.library.Library`
rather than `custom_op`, which costs several times more per call.

Products are linear in x, and W is constant. So the gradient with respect to x is g @ W, a tangent goes through as
t @ W^T, and derivatives of these are products again: every order, forward and reverse, is a `product`. It ignores
that kernels may quantize activations (a step function, whose own derivative says nothing).

torch.library.register_autograd would serve torch.autograd alone: what it makes raises inside torch.func.grad and drops
tangents. Hence an implementation for the key Autograd, of the same parts of torch as its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from ..errors import UsageError
from . import registry
from .plain import check_constant
from .weight import LAYOUTS, Weight, check_row_bits, rows_of, run_linear

TILE_WEIGHTS = 1 << 22  # decoded at a time for exact products: 16 MB
TILE_ROWS = 16  # of which a tile has a multiple: what the layouts keep together
WEIGHT = "Tensor[] planes, Tensor[] scales, int[] scales_bits, int[] shape, str kind, str layout, str kernel"
_LIBRARY = torch.library.Library("bitstrata", "DEF")


def _weight(
    x: Tensor,
    planes: Sequence[Tensor],
    scales: Sequence[Tensor],
    scales_bits: Sequence[int],
    shape: Sequence[int],
    kind: str,
    layout: str,
    kernel: str,
) -> Weight:
    """The weight with these `Weight.arguments`, for x."""
    device = planes[0].device
    if x.device != device:
        raise UsageError(f"activations on {x.device} meet a weight on {device}", hint="move one to the other")
    chosen = registry.of_layout(layout, kernel, device.type)
    return LAYOUTS[layout].from_op(tuple(planes), scales, scales_bits, *shape, kind, chosen)


def _linear(x: Tensor, *arguments: Any) -> Tensor:
    *parts, bits, row_bits = arguments
    weight = _weight(x, *parts)
    return run_linear(x, [weight], weight.checked(bits) if row_bits is None else rows_of(row_bits, x))[0]


def _lookup(index: Tensor, *arguments: Any) -> Tensor:
    *parts, bits, dtype = arguments
    weight = _weight(index, *parts)
    return weight.run_lookup(index, weight.checked(bits), dtype)


def _product(x: Tensor, *arguments: Any) -> Tensor:
    """Computed in float32, or float64 if x is, from a tile of W at a time; the result has x's dtype."""
    *parts, bits, row_bits, transposed = arguments
    weight = _weight(x, *parts)
    flat = x.reshape(-1, x.shape[-1])
    width = weight.in_features if transposed else weight.out_features
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = weight.readable(dtype)
    row_bits = None if row_bits is None else rows_of(row_bits, x)
    with torch.autocast(x.device.type, enabled=False):
        if row_bits is None:
            y = _exact(flat.to(dtype), weight, bits, transposed)
        else:
            if row_bits.device.type == "cpu":
                check_row_bits(row_bits, weight)
            y = flat.new_full((len(flat), width), torch.nan, dtype=dtype)  # what a device makes of unknown bits
            for value in weight.bits:
                chosen = (row_bits == value).nonzero().flatten()
                if len(chosen):
                    y[chosen] = _exact(flat[chosen].to(dtype), weight, value, transposed)
    return y.to(x.dtype).view(*x.shape[:-1], width)


def _exact(x: Tensor, weight: Weight, bits: int, transposed: bool) -> Tensor:
    rows, columns = weight.out_features, weight.in_features
    y = x.new_zeros(len(x), columns if transposed else rows)
    step = max(1, TILE_WEIGHTS // columns // TILE_ROWS) * TILE_ROWS
    for first in range(0, rows, step):
        last = min(rows, first + step)
        tile = weight.decode(bits, first, last, x.dtype)  # [last - first, K]
        if transposed:
            y.addmm_(x[:, first:last], tile)
        else:
            torch.mm(x, tile.T, out=y[:, first:last])
    return y


def _fake_linear(x: Tensor, planes: Any, scales: Any, scales_bits: Any, shape: Sequence[int], *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


def _fake_product(x: Tensor, planes: Any, scales: Any, scales_bits: Any, shape: Sequence[int], *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[1 if rest[-1] else 0])


def _fake_lookup(index: Tensor, planes: Any, scales: Any, scales_bits: Any, shape: Any, *rest: Any) -> Tensor:
    return index.new_empty(*index.shape, shape[1], dtype=rest[-1])


class _Linear(_SingleLevelFunction):
    """A product as autograd knows it, for reverse and forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, op: Any, keyset: Any, arguments: Sequence[Any]) -> Tensor:
        ctx.map = arguments if op._opname == "product" else (*arguments, False)
        with ExitStack() as stack:
            if torch._C._are_functorch_transforms_active():  # the next transform may differentiate too
                stack.enter_context(torch.enable_grad())
                stack.enter_context(forward_ad._set_fwd_grad_enabled(True))
            return _below(op, keyset, x, arguments)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *weight, transposed = ctx.map
        return torch.ops.bitstrata.product.default(gradient, *weight, not transposed), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        result: Tensor = torch.ops.bitstrata.product.default(tangent, *ctx.map)
        return result


def _below(op: Any, keyset: Any, x: Tensor, arguments: Sequence[Any]) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        y: Tensor = op.redispatch(keyset & torch._C._after_autograd_keyset, x, *arguments)
    return y


def _autograd(op: Any, keyset: Any, x: Tensor, *arguments: Any) -> Tensor:
    check_constant(arguments[1])
    forward = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    if x.is_floating_point() and (forward or (x.requires_grad and torch.is_grad_enabled())):
        with enable_single_level_autograd_function():
            y: Tensor = _Linear.apply(x, op, keyset, arguments)  # type: ignore[attr-defined]
        return y
    return _below(op, keyset, x, arguments)


def _batched(op: Any, info: Any, in_dims: Sequence[Any], x: Tensor, *arguments: Any) -> tuple[Tensor, int]:
    """What torch.func.vmap runs: one call with a dimension more; row_bits have their entries for each of its rows."""

    def in_front(tensor: Tensor, at: int | None) -> Tensor:
        return tensor.expand(info.batch_size, *tensor.shape) if at is None else tensor.movedim(at, 0)

    changed = []
    for argument, at in zip(arguments, in_dims[1:], strict=True):
        if isinstance(argument, Tensor):
            changed.append(in_front(argument, at).reshape(-1))
        elif isinstance(argument, (list, tuple)) and any(dim is not None for dim in at or ()):
            raise UsageError("vmap cannot map over a quantized weight", hint="map over activations and row_bits only")
        else:
            changed.append(argument)
    return op(in_front(x, in_dims[0]), *changed), 0


def _refuse_old_vmap(*_: Any) -> Tensor:
    raise UsageError(
        "quantized layers cannot be differentiated with is_grads_batched=True or vectorize=True",
        hint="use torch.func.jacrev, jacfwd or vmap",
    )


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {}  # of the ops, by name: for real tensors


def _register(name: str, first: str, rest: str, function: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    IMPLEMENTATIONS[name] = function
    _LIBRARY.define(f"{name}(Tensor {first}, {WEIGHT}, {rest}) -> Tensor")
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bitstrata::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.bitstrata, name).default
    _LIBRARY.impl(name, partial(_autograd, op), "Autograd", with_keyset=True)
    torch.library.register_vmap(f"bitstrata::{name}", partial(_batched, op), lib=_LIBRARY)
    _LIBRARY.impl(name, _refuse_old_vmap, "Batched")


_register("linear", "x", "int bits, Tensor? row_bits", _linear, _fake_linear)
_register("product", "x", "int bits, Tensor? row_bits, bool transposed", _product, _fake_product)
_register("lookup", "index", "int bits, ScalarType dtype", _lookup, _fake_lookup)
