"""The reference kernel: decode the whole weight, then the platform's matrix product.

Correct on every device and dtype, and slow: it materialises [N, K] at each call. Every other
kernel is compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from ..planes.decode import decode
from ..planes.weights import PlaneWeight, Scales, make_scales, scales_shapes, scales_tensors
from .registry import Kernel, register
from .weight import Weight, check_row_bits


class StoredWeight(Weight):
    """A PlaneWeight as it is."""

    layout = "stored"
    dtypes = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})

    def __init__(self, weight: PlaneWeight) -> None:
        super().__init__(
            weight.planes,
            weight.scales,
            weight.out_features,
            weight.in_features,
            weight.group_size,
            weight.kind,
            REFERENCE,
        )
        self._weight = weight

    def _attach(self) -> None:
        """PlaneWeight has checked its tensors."""

    @classmethod
    def pack(cls, weight: PlaneWeight, kernel: Kernel, *, apart: bool = False) -> Self:
        return cls(weight)

    def stored(self) -> PlaneWeight:
        return self._weight

    def with_pages(self, bits: int, planes: Sequence[Tensor], scales: Scales) -> Self:
        self.check_pages(bits, planes, scales)
        held = (*self.planes[:bits], *planes)
        return type(self)(PlaneWeight(held, {bits: scales}, self.in_features, self.group_size))

    def scales_of(self, bits: int) -> list[Tensor]:
        return list(scales_tensors(self.scales[bits], bits).values())

    @classmethod
    def from_op(
        cls,
        planes: tuple[Tensor, ...],
        scales: Sequence[Tensor],
        bits: Sequence[int],
        out_features: int,
        in_features: int,
        group_size: int,
        kind: str,
        kernel: Kernel,
    ) -> Self:
        left = iter(scales)
        made: dict[int, Scales] = {}
        for value in bits:
            names = scales_shapes(kind, value, 0, 0, 1)
            made[value] = make_scales(kind, value, dict(zip(names, left, strict=False)))
        return cls(PlaneWeight(planes, made, in_features, group_size))

    @classmethod
    def multiply(cls, x: Tensor, weights: Sequence[Any], bits: int | Tensor, kernel: Kernel) -> list[Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        ys = [weight._product(flat, bits) for weight in weights]
        return [y.view(*x.shape[:-1], y.shape[1]) for y in ys]

    def _product(self, x: Tensor, bits: int | Tensor) -> Tensor:
        if not isinstance(bits, Tensor):
            return torch.nn.functional.linear(x, decode(self._weight, bits, x.dtype))
        y = x.new_empty(len(x), self.out_features)
        check_row_bits(bits, self)
        for value in set(bits.tolist()):
            chosen = bits == value
            y[chosen] = self._product(x[chosen], value)
        return y

    def decode(self, bits: int, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return decode(self._weight.outputs(first, last), bits, dtype)

    def rows(self, index: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
        return decode(self._weight.take(index), bits, dtype)


def _reason(device: str, dtype: torch.dtype, forced: bool) -> str | None:
    return None if dtype in StoredWeight.dtypes else f"activations are {dtype}, not floating point"


REFERENCE = Kernel("reference", StoredWeight.layout, 0, "exact", None, _reason)
register(REFERENCE)
