"""Codes of a few bits, one after the other in 32-bit words, the first in the lowest bits of the first word.

A code may begin in one word and end in the next, so 32 codes of b bits are b words. Where b divides 32 none does, and
this is the packing of GPTQ, AWQ and compressed-tensors for 2, 4 and 8 bits; for 3 that of the first and the last.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32
ROWS = 1 << 20  # codes worked on at a time


def words_of(count: int, bits: int) -> int:
    """Words that hold `count` codes."""
    return -(-count * bits // WORD)


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """codes [R, C], whole numbers below 2^bits -> int32 [R, ceil(C bits / 32)]."""
    rows, count = codes.shape
    words = words_of(count, bits)
    result = torch.zeros(rows, words, dtype=torch.int32)
    at = torch.arange(count) * bits
    home, shift = at // WORD, at % WORD
    step = max(1, ROWS // count)
    for start in range(0, rows, step):
        some = codes[start : start + step].to(torch.int64)
        packed = torch.zeros(len(some), words + 1, dtype=torch.int64)
        packed.index_add_(1, home, (some << shift) & 0xFFFFFFFF)
        packed.index_add_(1, home + 1, some >> (WORD - shift))
        result[start : start + step] = _signed(packed[:, :words])
    return result


def _signed(words: Tensor) -> Tensor:
    """Numbers below 2^32 as the int32 of the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse: int32 [R, ceil(count bits / 32)] -> uint8 [R, count]. Raises ValueError for another width."""
    if words.dtype != torch.int32 or words.shape[1] != words_of(count, bits):
        raise ValueError(f"{list(words.shape)} of {words.dtype} are not {count} codes of {bits} bits a row")
    at = torch.arange(count) * bits
    home, shift = at // WORD, at % WORD
    after = (home + 1).clamp_max(words.shape[1] - 1)
    result = torch.empty(len(words), count, dtype=torch.uint8)
    step = max(1, ROWS // count)
    for start in range(0, len(words), step):
        some = words[start : start + step].to(torch.int64) & 0xFFFFFFFF
        value = (some[:, home] >> shift) | (some[:, after] << (WORD - shift))
        result[start : start + step] = (value & ((1 << bits) - 1)).to(torch.uint8)
    return result
