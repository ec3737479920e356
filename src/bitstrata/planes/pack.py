"""Bits <-> words: how one plane of a weight lies in memory and on disk.

A plane of a weight [N, K] is an int32 tensor [N, ceil(K/32)]. Bit b of word w holds column
32 w + b; a set bit means +1, a clear bit means -1. Padding bits past column K-1 are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32


def words_per_row(columns: int) -> int:
    """Words that hold one row of `columns` bits."""
    return -(-columns // WORD_BITS)


def pack_bits(bits: Tensor) -> Tensor:
    """Pack booleans [..., K] into words [..., ceil(K/32)], int32, lowest column in the lowest bit.

    `bits` may be bool, or any dtype that holds only 0 and 1; anything else raises ValueError,
    because a stray value such as the 0 of `torch.sign` would silently turn into -1.
    """
    if bits.dtype != torch.bool:
        if not bool(((bits == 0) | (bits == 1)).all()):
            raise ValueError("pack_bits takes zeros and ones only; convert signs with `sign > 0` first")
        bits = bits.bool()
    columns = bits.shape[-1]
    padded_columns = words_per_row(columns) * WORD_BITS
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, padded_columns - columns))
    octets = padded.view(*padded.shape[:-1], padded_columns // 8, 8)  # [..., bytes, 8]
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    packed: Tensor = (octets * weights).sum(dim=-1, dtype=torch.uint8)  # [..., bytes]
    return packed.contiguous().view(torch.int32)


def unpack_bits(words: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_bits`: words int32 [..., ceil(K/32)] -> bool [..., K]."""
    if words.dtype != torch.int32 or words.shape[-1] != words_per_row(columns):
        raise ValueError(
            f"expected int32 words [..., {words_per_row(columns)}] for {columns} columns, "
            f"got {words.dtype} {list(words.shape)}"
        )
    octets = words.contiguous().view(torch.uint8).unsqueeze(-1)  # [..., bytes, 1]
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    return ((octets >> shifts) & 1).flatten(-2)[..., :columns].bool()
