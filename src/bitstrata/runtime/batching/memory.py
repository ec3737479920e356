"""The keys and values of all running requests, in one place of fixed size.

    layer l:  keys [H, tokens, D], values [H, tokens, D']         H = key-value heads, each a Stored (stored.py)

A request holds one contiguous range of `tokens` while it runs, long enough for what it has and for its next tokens
(admission.py); what it wrote stays until its place is needed (prefixes.py). So attention reads its keys as a view, and
nothing is allocated while requests run, or copied but for those that grow beyond a neighbour or begin as another one
did. The price: a long request waits until a range of its length is free in one piece.

Ranges are counted in blocks of BLOCK tokens. Tensors are made when a layer first writes: only then its number of heads
and their widths are known.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ...errors import ResourceError
from ...kernels.cached import check_kv_cache_dtype, head_bytes
from ...memory import free_memory, is_out_of_memory
from .stored import Stored

BLOCK = 16


def _whole_blocks(tokens: int) -> int:
    return -(-tokens // BLOCK) * BLOCK


class TokenPool:
    """Room for the keys and values of `tokens` tokens, rounded up to whole blocks. Not thread-safe.

    kv_cache_dtype: auto, the dtype in which they come; int8 or int4. version: changes when the tensors are others.

    A model that cannot run in batches keeps something else: `states`, by where the range of each text starts
    (alone.py). kept_as: what may be used again of a range that ended: any "beginning" of it, the "whole", "nothing".

    Raises UsageError for another kv_cache_dtype.
    """

    version = 0
    kept_as = "beginning"

    def __init__(self, tokens: int, kv_cache_dtype: str = "auto") -> None:
        self.tokens, self.kv_cache_dtype = _whole_blocks(tokens), check_kv_cache_dtype(kv_cache_dtype)
        self._free = [range(0, self.tokens)]  # ascending, never touching
        self._layers: dict[int, tuple[Stored, Stored]] = {}
        self.states: dict[int, Any] = {}

    @property
    def used_tokens(self) -> int:
        """Tokens in ranges that are reserved now."""
        return self.tokens - sum(map(len, self._free))

    @property
    def bytes(self) -> int:
        """Bytes of all layers' tensors, and of what texts have beside them."""
        own: int = sum(state.bytes for state in list(self.states.values()))
        return own + sum(held.nbytes for layer in self._layers for held in self.layer(layer))

    def reserve(self, tokens: int) -> range | None:
        """The first free range of `tokens`, rounded up to blocks; None if there is none now."""
        size = _whole_blocks(tokens)
        for index, free in enumerate(self._free):
            if len(free) >= size:
                left = range(free.start + size, free.stop)
                self._free[index : index + 1] = [left] if left else []
                return range(free.start, free.start + size)
        return None

    def longest(self, others: Iterable[range] = ()) -> int:
        """Tokens of the longest range that would be free if `others` were released."""
        longest = length = end = 0
        for item in sorted([*self._free, *others], key=lambda item: item.start):
            length = length + len(item) if item.start == end else len(item)
            longest, end = max(longest, length), item.stop
        return longest

    def release(self, taken: range) -> None:
        """Give back what `reserve` returned."""
        self.states.pop(taken.start, None)
        self._free = self._free_without(taken)

    def grow(self, taken: range, used: int, tokens: int) -> range | None:
        """A range of `tokens` in the place of `taken`, with the same first `used` tokens; None if there is none now.

        It begins where `taken` does if it can; otherwise the tokens move, into `taken` itself where they must.
        """
        before = self._free
        self._free = self._free_without(taken)
        size = _whole_blocks(tokens)
        for index, free in enumerate(self._free):
            if free.start <= taken.start and taken.start + size <= free.stop:
                around = (range(free.start, taken.start), range(taken.start + size, free.stop))
                self._free[index : index + 1] = [item for item in around if item]
                return range(taken.start, taken.start + size)
        larger = self.reserve(tokens)
        if larger is None:
            self._free = before
            return None
        self.copy(taken, larger, used)
        if taken.start in self.states and larger.start != taken.start:
            self.states[larger.start] = self.states.pop(taken.start)
        return larger

    def copy(self, source: range, target: range, tokens: int) -> None:
        """Put the first `tokens` of the range `source` to the beginning of `target`; the two may overlap."""
        for layer in self._layers:
            for held in self.layer(layer):
                held[:, target.start : target.start + tokens] = held[:, source.start : source.start + tokens].clone()

    def enlarge(self, tokens: int) -> None:
        """Have room for `tokens`; ranges stay what and where they are. Raises ResourceError if there is no memory."""
        before, size = self.tokens, _whole_blocks(tokens)
        if size <= before:
            return
        self.version += 1
        done: list[int] = []
        try:
            for layer, pair in list(self._layers.items()):  # a layer at a time: both versions of one at once
                larger = self._make(pair[0].empty, pair[1].empty, size)
                for old_side, new_side in zip(pair, larger, strict=True):
                    for old, new in zip(old_side.tensors, new_side.tensors, strict=True):
                        new[:, :before] = old
                self._layers[layer] = larger
                done.append(layer)
        except ResourceError:
            for layer in done:
                keys, values = self._layers[layer]
                self._layers[layer] = keys.cut(before), values.cut(before)
            raise
        self.tokens = size
        self._free = self._free_without(range(before, size))

    def _free_without(self, taken: range) -> list[range]:
        """What is free once `taken` is."""
        merged: list[range] = []
        for free in sorted([*self._free, taken], key=lambda item: item.start):
            if merged and merged[-1].stop == free.start:
                merged[-1] = range(merged[-1].start, free.stop)
            else:
                merged.append(free)
        return merged

    def layer(self, layer: int) -> tuple[Tensor, ...]:
        """The tensors of a layer that has written: of its keys, then of its values."""
        keys, values = self._layers[layer]
        return *keys.tensors, *values.tensors

    def stored(self, layer: int) -> tuple[Stored, Stored]:
        """Keys and values of a layer that has written."""
        return self._layers[layer]

    def write(self, layer: int, places: Tensor, key: Tensor, value: Tensor) -> tuple[Stored, Stored]:
        """Put key [H, n, D] and value [H, n, D'] of `layer` to `places` (int64 [n]); all keys and values of the layer.

        Raises ResourceError if there is no memory for these.
        """
        pair = self._layers.get(layer)
        if pair is None:
            pair = self._layers[layer] = self._make(key, value, self.tokens)
        pair[0].write(places, key)
        pair[1].write(places, value)
        return pair

    def make_as(self, other: TokenPool) -> None:
        """Make the tensors of all layers that `other` has, for heads of these widths. Raises ResourceError."""
        for layer, (keys, values) in other._layers.items():
            self._layers[layer] = self._make(keys.empty, values.empty, self.tokens)
        self.version += 1

    def _make(self, key: Tensor, value: Tensor, tokens: int) -> tuple[Stored, Stored]:
        """Room for so many tokens, with the heads, widths and dtypes of key [H, ., D] and value [H, ., D']."""
        kind = self.kv_cache_dtype
        size = tokens * sum(one.shape[0] * head_bytes(one.shape[2], kind, one.dtype) for one in (key, value))
        try:
            # a system may grant memory that it does not have, and end the process that uses it; a GPU refuses
            if key.device.type == "cpu" and size > free_memory():
                raise MemoryError
            keys, values = (
                Stored.of(one.shape[0], tokens, one.shape[2], one.dtype, one.device, kind) for one in (key, value)
            )
            return keys, values
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise ResourceError(
                f"no memory for keys and values of {tokens} tokens: every layer takes {size / 1e9:.2f} GB",
                hint="ask for fewer tokens; of an engine lower cache_tokens (--cache-tokens), or max_requests "
                "(--max-requests) where it is not given",
            ) from error

    def clear(self) -> None:
        """Drop the tensors."""
        self._layers.clear()
        self.states.clear()
        self.version += 1
