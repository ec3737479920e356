"""A packed weight where vLLM multiplies by it, at the bits of the rows that run.

    bitstrata::served_linear    x [rows, K], the layer's key -> [rows, N]
    bitstrata::served_lookup    ids [rows], the layer's key -> [rows, K]
    bitstrata::served_experts   x [rows, H], scores and chosen experts [rows, k], the layer's key -> [rows, H]

A compiler sees these ops, and nothing of the bits: one graph serves all of them. As vLLM's own attention does, an op
gets a layer's key and finds the layer in the forward context. Outside of a compiled graph no op is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import ForwardContext, get_forward_context, is_forward_context_available

from ...errors import UsageError
from ...kernels import Weight
from .rows import LayerRows, Rows

_LIBRARY = torch.library.Library("bitstrata", "FRAGMENT")


class Product:
    """A layer's weight [N, K], in parts that follow each other along N.

    Args:
        parts: each with the rows that it runs at; None for a layer that always runs at the one precision that it has.
    """

    def __init__(self, parts: Sequence[tuple[Weight, LayerRows | None]]) -> None:
        self.parts = tuple(parts)

    def linear(self, x: Tensor) -> Tensor:
        """x [..., K] @ W^T -> [..., N], in x's dtype."""
        count = x.shape[:-1].numel()
        made = [
            weight.linear(x, weight.bits[-1] if rows is None else bits_of(rows, count)) for weight, rows in self.parts
        ]
        return made[0] if len(made) == 1 else torch.cat(made, dim=-1)

    def at(self, rows: Rows) -> Product:
        """The same weights, for other rows of the same model."""
        return Product([(weight, None if own is None else rows.of_table(own.table)) for weight, own in self.parts])

    def lookup(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `ids` [...] of W, which is in one part: [..., K]."""
        ((weight, _),) = self.parts
        return weight.lookup(ids, weight.bits[-1], dtype)


def bits_of(rows: LayerRows, count: int) -> int | Tensor:
    """The bits of `count` rows of the step that runs: one value, or int8 [count]."""
    step = get_forward_context() if is_forward_context_available() else None
    return rows.of(count, step, request_starts(step))


def request_starts(step: ForwardContext | None) -> list[int] | None:
    """The rows before each request of a step, and all of them at the end; None where there are no requests."""
    metadata = None if step is None else step.attn_metadata
    if metadata is None:
        return None
    if not isinstance(metadata, dict):
        raise UsageError("bits per request cannot run in micro-batches", hint="do without --enable-dbo")
    for layer in metadata.values():
        starts = getattr(layer, "query_start_loc", None)
        if starts is not None:
            found: list[int] = starts.tolist()
            return found
    raise UsageError("vLLM's attention says not where the requests of a step start: bits per request cannot run")


def hold_place(key: str, layer: nn.Module) -> str:
    """Let ops find `layer` by `key`, which is returned."""
    places = get_current_vllm_config().compilation_config.static_forward_context
    if places.setdefault(key, layer) is not layer:
        raise UsageError(f"two layers of the model are called {key}")
    return key


def linear(layer: Any, x: Tensor) -> Tensor:
    """What `layer`, which has a `product`, makes of x: by an op where a compiler looks on."""
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.bitstrata.served_linear(x, layer.product_key, layer.product_rows)
        return y
    product: Product = layer.product
    return product.linear(x)


def lookup(layer: Any, ids: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Rows `ids` of the weight of `layer`, which has a `product`."""
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.bitstrata.served_lookup(ids, layer.product_key, width, dtype)
        return y
    product: Product = layer.product
    return product.lookup(ids, dtype)


def experts(layer: Any, x: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
    """What the experts of `layer`, which has a `product`, make of x [rows, H]."""
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.bitstrata.served_experts(x, scores, chosen, layer.product_key)
        return y
    made: Tensor = layer.product.run(x, scores, chosen)
    return made


def _product(key: str) -> Any:
    return get_forward_context().no_compile_layers[key].product


def _served_linear(x: Tensor, key: str, out_features: int) -> Tensor:
    y: Tensor = _product(key).linear(x)
    return y


def _served_lookup(ids: Tensor, key: str, width: int, dtype: torch.dtype) -> Tensor:
    y: Tensor = _product(key).lookup(ids, dtype)
    return y


def _served_experts(x: Tensor, scores: Tensor, chosen: Tensor, key: str) -> Tensor:
    y: Tensor = _product(key).run(x, scores, chosen)
    return y


def _fake_linear(x: Tensor, key: str, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _fake_lookup(ids: Tensor, key: str, width: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty(*ids.shape, width, dtype=dtype)


def _fake_experts(x: Tensor, scores: Tensor, chosen: Tensor, key: str) -> Tensor:
    return torch.empty_like(x)


for _name, _schema, _function, _fake in (
    ("served_linear", "(Tensor x, str key, int out_features) -> Tensor", _served_linear, _fake_linear),
    ("served_lookup", "(Tensor ids, str key, int width, ScalarType dtype) -> Tensor", _served_lookup, _fake_lookup),
    (
        "served_experts",
        "(Tensor x, Tensor scores, Tensor chosen, str key) -> Tensor",
        _served_experts,
        _fake_experts,
    ),
):
    _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bitstrata::{_name}", _fake, lib=_LIBRARY)
