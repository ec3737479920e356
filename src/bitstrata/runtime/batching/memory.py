"""The keys and values of all running requests, in one place of fixed size.

    layer l:  keys [H, tokens, D], values [H, tokens, D']         H = key-value heads

A request holds one contiguous range of `tokens` from when it is admitted until it ends, long enough
for its prompt and every token it may still make. So attention reads a request's keys as a view,
nothing is allocated or copied while requests run, and a request that was admitted never has to be
thrown out for lack of memory. The price is that room for tokens that are never made stays unused
until the request ends, and that a long request waits until a range of its length is free in one piece.

Ranges are counted in blocks of BLOCK tokens. Tensors are made when a layer first writes: only then
its number of heads and their widths are known, whatever the architecture calls them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 16


@dataclass(frozen=True)
class Range:
    """Tokens start..stop-1 of the pool."""

    start: int
    stop: int


class TokenPool:
    """Room for the keys and values of `tokens` tokens, rounded up to whole blocks. Not thread-safe."""

    def __init__(self, tokens: int) -> None:
        self.tokens = -(-tokens // BLOCK) * BLOCK
        self._free = [Range(0, self.tokens)]  # ascending, never touching
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def used_tokens(self) -> int:
        """Tokens in ranges that are reserved now."""
        return self.tokens - sum(free.stop - free.start for free in self._free)

    @property
    def bytes(self) -> int:
        """Bytes of all layers' tensors."""
        return sum(tensor.nbytes for pair in self._layers.values() for tensor in pair)

    def reserve(self, tokens: int) -> Range | None:
        """The first free range of `tokens`, rounded up to blocks; None if there is none now."""
        size = -(-tokens // BLOCK) * BLOCK
        for index, free in enumerate(self._free):
            if free.stop - free.start >= size:
                left = Range(free.start + size, free.stop)
                self._free[index : index + 1] = [left] if left.stop > left.start else []
                return Range(free.start, free.start + size)
        return None

    def release(self, taken: Range) -> None:
        """Give back what `reserve` returned."""
        merged: list[Range] = []
        for free in sorted([*self._free, taken], key=lambda item: item.start):
            if merged and merged[-1].stop == free.start:
                merged[-1] = Range(merged[-1].start, free.stop)
            else:
                merged.append(free)
        self._free = merged

    def write(self, layer: int, places: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put key [H, n, D] and value [H, n, D'] of `layer` to `places` (int64 [n]); the layer's whole tensors."""
        pair = self._layers.get(layer)
        if pair is None:
            pair = self._layers[layer] = (
                torch.zeros(key.shape[0], self.tokens, key.shape[2], dtype=key.dtype, device=key.device),
                torch.zeros(value.shape[0], self.tokens, value.shape[2], dtype=value.dtype, device=value.device),
            )
        pair[0].index_copy_(1, places, key)
        pair[1].index_copy_(1, places, value)
        return pair

    def clear(self) -> None:
        """Drop the tensors."""
        self._layers.clear()
