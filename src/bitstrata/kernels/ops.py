"""The operations as `torch.library` ops, so that compilers, tracers and transforms see one opaque node.

    bitstrata::plane_linear          y = x @ W^T, every row at the same bits
    bitstrata::plane_linear_rows     one bits value a row
    bitstrata::plane_product         x @ W^T or x @ W, W exactly as decoded: the linear map that the two stand for
    bitstrata::plane_lookup          rows of W, chosen by index
    bitstrata::prepared_...          the same four from a weight in a kernel's own layout

They take the layer's tensors as lists, because a dispatcher schema has no structures: planes; then the tensors of the
scales for `scales_bits`, one after the other; or the tensors and the shape of a prepared weight. They are defined
through `torch.library.Library` rather than `custom_op`, which costs several times more per call.

Products are linear in x, and W is constant. So the gradient with respect to x is g @ W, a tangent goes through as
t @ W^T, and derivatives of these are products again: every order, forward and reverse, is a `..._product`. It ignores
that kernels may quantize activations (a step function, whose own derivative says nothing).

torch.library.register_autograd would serve torch.autograd alone: what it makes raises inside torch.func.grad and drops
tangents. Hence an implementation for the key Autograd, of the same parts of torch as its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from ..errors import UsageError
from . import run

_LIBRARY = torch.library.Library("bitstrata", "DEF")
# the arguments that describe a weight, stored or prepared, and what makes it from them
_WEIGHTS = {
    "plane": "Tensor[] planes, Tensor[] scales, str kind, int[] scales_bits, int group_size",
    "prepared": "Tensor[] planes, Tensor[] scales, int[] scales_bits, str layout, int out_features, int group_size, "
    "str kind",
}
_MAKERS: dict[str, Any] = {"plane": run.stored_weight, "prepared": run.prepared_weight}


def _linear(family: str, x: Tensor, *arguments: Any) -> Tensor:
    *parts, bits = arguments
    return run.linear(x, [_MAKERS[family](x.shape[-1], *parts)], bits)[0]


def _product(family: str, x: Tensor, *arguments: Any) -> Tensor:
    *parts, columns, bits, row_bits, transposed = arguments
    return run.product(x, _MAKERS[family](columns, *parts), bits, row_bits, transposed)


def _lookup(family: str, index: Tensor, *arguments: Any) -> Tensor:
    *parts, bits, columns, dtype = arguments
    return run.lookup(index, _MAKERS[family](columns, *parts), bits, dtype)


def _out_features(family: str, arguments: Sequence[Any]) -> int:
    rows: int = arguments[0][0].shape[0] if family == "plane" else arguments[4]
    return rows


def _fake_linear(family: str, x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], _out_features(family, arguments))


def _fake_product(family: str, x: Tensor, *arguments: Any) -> Tensor:
    columns, _, _, transposed = arguments[-4:]
    return x.new_empty(*x.shape[:-1], columns if transposed else _out_features(family, arguments))


def _fake_lookup(family: str, index: Tensor, *arguments: Any) -> Tensor:
    *_, columns, dtype = arguments
    return index.new_empty(*index.shape, columns, dtype=dtype)


class _Linear(_SingleLevelFunction):
    """A product as autograd knows it, for reverse and forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, op: Any, keyset: Any, arguments: Sequence[Any]) -> Tensor:
        ctx.map = _map_of(op, x.shape[-1], arguments)
        with ExitStack() as stack:
            if torch._C._are_functorch_transforms_active():  # the next transform may differentiate too
                stack.enter_context(torch.enable_grad())
                stack.enter_context(forward_ad._set_fwd_grad_enabled(True))
            return _below(op, keyset, x, arguments)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        product, *weight, transposed = ctx.map
        return product(gradient, *weight, not transposed), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        product, *weight, transposed = ctx.map
        result: Tensor = product(tangent, *weight, transposed)
        return result


def _map_of(op: Any, columns: int, arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The linear map of x [..., columns] that `op` is: a product op and its arguments after x."""
    family, _, name = op._opname.partition("_")
    if name == "product":
        return op, *arguments
    *weight, bits = arguments
    rows = name == "linear_rows"
    product = getattr(torch.ops.bitstrata, f"{family}_product").default
    return product, *weight, columns, 0 if rows else bits, bits if rows else None, False


def _below(op: Any, keyset: Any, x: Tensor, arguments: Sequence[Any]) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        y: Tensor = op.redispatch(keyset & torch._C._after_autograd_keyset, x, *arguments)
    return y


def check_constant(scales: Iterable[Tensor]) -> None:
    """Raise UsageError if somebody waits for derivatives with respect to a weight's own numbers: there are none."""
    backward, forward = torch.is_grad_enabled(), forward_ad._current_level >= 0
    for tensor in scales:
        if (backward and tensor.requires_grad) or (forward and forward_ad.unpack_dual(tensor).tangent is not None):
            raise UsageError(
                "derivatives with respect to the scales, offsets or tables of a quantized weight are not computed",
                hint="detach them; `bitstrata quantize --preset best` tunes them",
            )


def _autograd(op: Any, keyset: Any, x: Tensor, *arguments: Any) -> Tensor:
    _, scales, *_ = arguments
    check_constant(scales)
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


def _register(family: str) -> None:
    for name, first, rest, function, fake in (
        ("linear", "x", "int bits", _linear, _fake_linear),
        ("linear_rows", "x", "Tensor row_bits", _linear, _fake_linear),
        ("product", "x", "int in_features, int bits, Tensor? row_bits, bool transposed", _product, _fake_product),
        ("lookup", "index", "int bits, int columns, ScalarType dtype", _lookup, _fake_lookup),
    ):
        name = f"{family}_{name}"
        _LIBRARY.define(f"{name}(Tensor {first}, {_WEIGHTS[family]}, {rest}) -> Tensor")
        _LIBRARY.impl(name, partial(function, family), "CompositeExplicitAutograd")
        torch.library.register_fake(f"bitstrata::{name}", partial(fake, family), lib=_LIBRARY)
        op = getattr(torch.ops.bitstrata, name).default
        _LIBRARY.impl(name, partial(_autograd, op), "Autograd", with_keyset=True)
        torch.library.register_vmap(f"bitstrata::{name}", partial(_batched, op), lib=_LIBRARY)
        _LIBRARY.impl(name, _refuse_old_vmap, "Batched")


for _family in _WEIGHTS:
    _register(_family)
