"""Keys or values of a layer as the cache keeps them: numbers of the model's dtype, or codes (kernels/cached.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...kernels.cached import BITS, code_bytes, decode, encode


@dataclass(frozen=True)
class Stored:
    """Room for `tokens` tokens of H heads of `width` numbers, which come and go as `dtype`.

    tensors: [H, tokens, width] of `dtype`; or, if `bits` is not None, codes uint8 [H, tokens, bytes] and their meaning
        bf16 [H, tokens, 2].
    """

    tensors: tuple[Tensor, ...]
    width: int
    dtype: torch.dtype
    bits: int | None

    @classmethod
    def of(cls, heads: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device, kind: str) -> Stored:
        """Room that holds zeros. kind: one of kernels.cached.BITS."""
        bits = BITS[kind]
        if bits is None:
            tensors: tuple[Tensor, ...] = (torch.zeros(heads, tokens, width, dtype=dtype, device=device),)
        else:
            codes = torch.zeros(heads, tokens, code_bytes(width, bits), dtype=torch.uint8, device=device)
            tensors = codes, torch.zeros(heads, tokens, 2, dtype=torch.bfloat16, device=device)
        return cls(tensors, width, dtype, bits)

    def write(self, places: Tensor, x: Tensor) -> None:
        """Put x [H, n, width] to `places`, int64 [n]."""
        for held, part in zip(self.tensors, (x,) if self.bits is None else encode(x, self.bits), strict=True):
            held.index_copy_(1, places, part)

    def read(self, places: slice | Tensor) -> Tensor:
        """What lies at `places`: of a slice [H, n, width], of numbers a view; of a tensor [H, *places, width]."""
        if self.bits is None:
            return self.tensors[0][:, places]
        codes, meaning = (held[:, places] for held in self.tensors)
        return decode(codes, meaning, self.width, self.bits).to(self.dtype)

    def cut(self, tokens: int) -> Stored:
        """The first `tokens` alone, as a copy."""
        return replace(self, tensors=tuple(held[:, :tokens].clone() for held in self.tensors))

    @property
    def empty(self) -> Tensor:
        """No tokens [H, 0, width], as they come."""
        heads = self.tensors[0].shape[0]
        return torch.empty(heads, 0, self.width, dtype=self.dtype, device=self.tensors[0].device)
