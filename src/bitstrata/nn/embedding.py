"""The token embedding from planes, and the output head that shares them.

Both always run at the one precision they are stored at. Where a model ties its head to its
embedding there is one copy of the planes, the embedding's: the head multiplies by it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.reference import StoredWeight
from ..planes.weights import PlaneWeight
from .bits import BitsOrPlan, BitsState
from .stored import PlaneModule


class PlaneEmbedding(PlaneModule):
    """Rows of W by token: ids [...] -> [..., K] in the placeholder's dtype. PlaneModule says how W is held.

    Args:
        rows: tokens, N; columns: the width, K.
        bits: the one that it has; None for a module that is given its weight.
        state: of the model that it belongs to, whose arithmetic holds for the head's product too.
        scale: rows are multiplied by it, as some architectures do; rounded to the rows' dtype first if
            `round_scale`.
        shape: the other arguments of PlaneModule.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        bits: int | None,
        state: BitsState | None = None,
        scale: float | None = None,
        round_scale: bool = False,
        padding_idx: int | None = None,
        **shape: Any,
    ) -> None:
        super().__init__(columns, rows, bits=() if bits is None else (bits,), **shape)
        self.scale, self.round_scale = scale, round_scale
        self.bits_state = state or BitsState()
        self.num_embeddings, self.embedding_dim, self.padding_idx = rows, columns, padding_idx
        self.is_tied = False

    @classmethod
    def from_weight(
        cls, weight: PlaneWeight, *, state: BitsState | None = None, dtype: torch.dtype | None = None
    ) -> PlaneEmbedding:
        """An embedding that holds `weight`, which has one bits value."""
        made = cls(
            weight.out_features,
            weight.in_features,
            bits=None,
            group_size=weight.group_size,
            kind=weight.kind,
            state=state,
            device=weight.planes[0].device,
            dtype=dtype,
        )
        made.packed = StoredWeight(weight)
        return made

    def forward(self, ids: Tensor) -> Tensor:
        dtype = self.get_buffer("weight").dtype
        rows = self.packed.lookup(ids, self.bits[0], dtype)
        if self.scale is None:
            return rows
        if self.round_scale:
            return rows * torch.full((), self.scale, dtype=dtype, device=rows.device)
        return rows * self.scale

    def product(self, x: Tensor) -> Tensor:
        """x [..., K] @ W^T."""
        return self.packed.linear(x, self.bits[0], None if self.bits_state is None else self.bits_state.arithmetic)


class TiedHead(nn.Module):
    """y = x @ W^T + bias with the W of a PlaneEmbedding; has no weight of its own.

    The embedding is not a submodule here: its planes are stored, moved and counted once, under its own name.
    """

    embedding: PlaneEmbedding

    def __init__(self, embedding: PlaneEmbedding, bias: bool = False) -> None:
        super().__init__()
        self.__dict__["embedding"] = embedding
        embedding.is_tied = True
        weight = embedding.weight
        assert isinstance(weight, Tensor)
        self.in_features, self.out_features = embedding.in_features, embedding.out_features
        self.bias: nn.Parameter | None = None
        if bias:
            empty = torch.zeros(self.out_features, dtype=weight.dtype, device=weight.device)
            self.bias = nn.Parameter(empty, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The embedding's placeholder, for code that asks a layer's dtype."""
        return self.embedding.get_buffer("weight")

    share = 1.0

    def bytes_read(self, bits: BitsOrPlan) -> int:
        """Bytes of the stored tensors that a product reads, whatever the model's `bits`."""
        return self.embedding.bytes_read(self.embedding.bits[0])

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding.product(x)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, tied to a PlaneEmbedding"
