"""PlaneLinear: a linear layer whose weight is planes and scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import is_plain
from ..kernels.reference import StoredWeight
from ..planes.weights import PlaneWeight
from .bits import BitsOrPlan, BitsState
from .stored import PlaneModule


class PlaneLinear(PlaneModule):
    """y = x @ W_bits^T + bias, bits taken from the model's BitsState. PlaneModule says how W is held.

    Args:
        name: the layer's name in the model; plans look it up.
        state: the model's BitsState.
        dtype: of the bias and the placeholder.
        shape: the other arguments of PlaneModule.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        name: str,
        state: BitsState,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **shape: Any,
    ) -> None:
        super().__init__(in_features, out_features, device=device, dtype=dtype, **shape)
        self.name, self.bits_state = name, state
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
            bits=(),
            group_size=weight.group_size,
            kind=weight.kind,
            bias=bias is not None,
            device=weight.planes[0].device,
            dtype=dtype if dtype is not None or bias is None else bias.dtype,
        )
        layer.hold(weight)
        if layer.bias is not None and bias is not None:
            layer.bias.data.copy_(bias)
        return layer

    share = 1.0  # of tokens, that are multiplied by it: an expert's is what a router gives it where all get the same

    def hold(self, weight: PlaneWeight) -> None:
        """Hold `weight` as it is stored."""
        self.packed = StoredWeight(weight)

    def bytes_read(self, bits: BitsOrPlan) -> int:
        """Bytes of the stored tensors that a product needs while the model runs at `bits`, an int or a plan."""
        if len(self.bits) == 1:  # whatever the model's are
            return super().bytes_read(self.bits[0])
        return super().bytes_read(bits if isinstance(bits, int) else bits[self.name])

    def forward(self, x: Tensor, bits: int | Tensor | None = None) -> Tensor:
        """`bits` are given where the rows are only some of the model's tokens: one value, or one a row."""
        state, given = self.bits_state, bits is not None
        if bits is None:
            bits = state.bits_for(self.name, x.shape[:-1], x.device)
        fused = None if given or state.arithmetic is not None or self._packed is None else self.fused
        if fused is not None and is_plain(x):
            y = fused.linear(self, x, bits)
        else:
            y = self.packed.linear(x, bits, state.arithmetic)
        return self.with_bias(y)

    def with_bias(self, y: Tensor) -> Tensor:
        """Outputs of the weight with the bias, if there is one."""
        return y if self.bias is None else y + self.bias

    @property
    def is_bare(self) -> bool:
        """Whether a call does no more than multiply by a packed weight: nothing is hooked into it."""
        replaced = "forward" in self.__dict__  # as accelerate does
        return self._packed is not None and not (replaced or self._forward_hooks or self._forward_pre_hooks)
