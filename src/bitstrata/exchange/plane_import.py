"""Layers of programs that keep bit-planes, as bitstrata does.

    AnyBCQ          qweight int32 [K / 32, P, N], plane p of 32 columns a word, the lowest column in the lowest bit
                    alpha_<b> [J, b, N], beta_<b> [J, N]         W_b = beta + sum_p alpha_p B_p,     B in -1, +1
    BPDQ            B int32 [K / 32, P, N], the same words, c [J, P + 1, N], the offset last
                                                                 W = c_P + sum_p c_p b_p,            b in 0, 1
    Any-Precision   qweight int32 [P, N, K / 32], lut<b> fp16 [N, 2^b]     W_b = lut_b[the first b bits]

In a row of Any-Precision, a bit of a byte is a column, the first one highest; and bytes are turned around, so that 32
threads read words side by side: byte i of a stretch of 4 T bytes (T = 32, fewer in the last one) is byte
3 - i div T of word i mod T.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..planes import AffineScales, Codebook, PlaneWeight, pack_bits
from ..planes.weights import SCALE_DTYPE
from .stored import Stored
from .uniform import Coefficients

THREADS = 32  # of a stretch


def _planes(words: Tensor) -> tuple[Tensor, ...]:
    """int32 [K / 32, P, N] -> P planes [N, K / 32]."""
    return tuple(words[:, plane].T.contiguous() for plane in range(words.shape[1]))


def _half(stored: Stored, name: str) -> Tensor:
    """A tensor of scales, in fp16. Raises ModelError if that is not what is stored."""
    value = stored.read(name)
    if not torch.equal(value.to(SCALE_DTYPE).double(), value.double()):
        raise ModelError(f"{name} holds {value.dtype} numbers that fp16 does not", hint="save it in fp16")
    return value.to(SCALE_DTYPE)


def anybcq_weight(stored: Stored, name: str, settings: Mapping[str, Any]) -> PlaneWeight:
    """The layer `name` of AnyBCQ, at all of its precisions."""
    words = stored.read(f"{name}.qweight")
    columns = 32 * words.shape[0]
    given = int(settings["group_size"])
    scales = {
        bits: AffineScales(
            _half(stored, f"{name}.alpha_{bits}").permute(1, 2, 0).contiguous(),
            _half(stored, f"{name}.beta_{bits}").T.contiguous(),
        )
        for bits in range(settings["seed_precision"], settings["parent_precision"] + 1)
    }
    return PlaneWeight(_planes(words), scales, columns, columns if given == -1 else given)


def bpdq_coefficients(stored: Stored, name: str, settings: Mapping[str, Any]) -> Coefficients:
    """The layer `name` of BPDQ. In signs, a bit's scale is half, and the offset half of all scales more."""
    words, given = stored.read(f"{name}.B"), stored.read(f"{name}.c").double()
    size, columns = int(settings["group_size"]), 32 * words.shape[0]
    if given.shape[1] != words.shape[1] + 1 or given.shape[0] * size != columns:
        raise ModelError(
            f"{name}: c {list(given.shape)} does not fit planes of {columns} columns in groups of {size}",
            hint="rows that groups do not divide are not known here",
        )
    scale = given[:, :-1].permute(1, 2, 0).contiguous() / 2  # [P, N, J]
    offset = given[:, -1].T + scale.sum(0)
    return Coefficients(_planes(words), scale, offset, columns, size)


def anyprecision_weight(stored: Stored, name: str, settings: Mapping[str, Any]) -> PlaneWeight:
    """The layer `name` of Any-Precision LLM, at all of its precisions."""
    words = stored.read(f"{name}.qweight")
    octets = words.contiguous().view(torch.uint8)  # [P, N, K / 8]
    octets = octets[:, :, places(octets.shape[2])]
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
    bits = ((octets.unsqueeze(3) >> shifts) & 1).flatten(2)  # [P, N, K]
    planes = tuple(pack_bits(plane) for plane in bits)
    scales = {
        precision: Codebook(_half(stored, f"{name}.lut{precision}"))
        for precision in range(settings["seed_precision"], settings["parent_precision"] + 1)
    }
    return PlaneWeight(planes, scales, bits.shape[2], bits.shape[2])


def places(count: int) -> Tensor:
    """Where each of `count` bytes of a row, a multiple of four, is stored: int64 [count]."""
    found = []
    for start in range(0, count, 4 * THREADS):
        length = min(4 * THREADS, count - start)
        threads = length // 4
        index = torch.arange(length)
        found.append(start + index % threads * 4 + (3 - index // threads))
    return torch.cat(found)
