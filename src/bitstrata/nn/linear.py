"""PlaneLinear: a linear layer whose weight is planes and scales."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..planes.weights import PlaneWeight
from .bits import BitsOrPlan, BitsState
from .fused import FusedGroup
from .stored import PlaneModule


class PlaneLinear(PlaneModule):
    """y = x @ W_bits^T + bias, bits taken from the model's BitsState. PlaneModule says how W is held.

    Args:
        name: the layer's name in the model; plans look it up.
        state: the model's BitsState.
        kind: of the scales, "affine", "affine8" or "codebook".
        dtype: of the bias and the placeholder.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        name: str,
        state: BitsState,
        bits: tuple[int, ...],
        group_size: int,
        kind: str = "affine",
        bias: bool = False,
        paged: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bits=bits,
            group_size=group_size,
            kind=kind,
            paged=paged,
            device=device,
            dtype=dtype,
        )
        self.name, self.bits_state = name, state
        self.fused: FusedGroup | None = None
        self.bias = (
            nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        )

    @classmethod
    def from_weight(
        cls,
        weight: PlaneWeight,
        bias: Tensor | None = None,
        *,
        name: str = "",
        state: BitsState | None = None,
        dtype: torch.dtype | None = None,
    ) -> PlaneLinear:
        """A layer that holds `weight`; without `state` it gets one of its own. `dtype` is the bias's by default."""
        layer = cls(
            weight.in_features,
            weight.out_features,
            name=name,
            state=state or BitsState({name: weight.bits}),
            bits=weight.bits,
            group_size=weight.group_size,
            kind=weight.kind,
            bias=bias is not None,
            device=weight.planes[0].device,
            dtype=dtype if dtype is not None or bias is None else bias.dtype,
        )
        for key, tensor in weight.tensors().items():
            setattr(layer, key, tensor)
        if layer.bias is not None and bias is not None:
            layer.bias.data.copy_(bias)
        return layer

    def bytes_read(self, bits: BitsOrPlan) -> int:
        """Bytes of the stored tensors that a product needs while the model runs at `bits`, an int or a plan."""
        if len(self.bits) == 1:
            return super().bytes_read(self.bits[0])
        return super().bytes_read(bits if isinstance(bits, int) else bits[self.name])

    def forward(self, x: Tensor) -> Tensor:
        state = self.bits_state
        bits, arithmetic = state.bits_for(self.name, x.shape[:-1], x.device), state.arithmetic
        if isinstance(bits, int) and arithmetic is None and self.fused is not None and self.fused.can_share(x):
            y = self.fused.output(self, x, bits)
            return y if self.bias is None else y + self.bias
        y = self._times(x, bits, arithmetic)
        return y if self.bias is None else y + self.bias
