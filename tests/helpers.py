"""Builders shared by the tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitstrata.planes import AffineDecoder, CodebookDecoder, Decoder, PlaneWeight, group_count, pack_bits


def random_weight(
    N: int,
    K: int,
    bits: Sequence[int] = (2, 3, 4),
    group_size: int = 32,
    decoder: str = "affine",
    seed: int = 0,
) -> PlaneWeight:
    """A weight [N, K] with random planes and, for each of `bits`, a random decoder.

    Scales of plane i are about 2**-i, as in a real weight, so that entries are of order one. Every
    decoder is drawn independently: a test that mixes up two of them fails.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    planes = tuple(pack_bits(torch.rand(N, K, generator=generator) < 0.5) for _ in range(max(bits)))
    groups = group_count(K, group_size)
    decoders: dict[int, Decoder] = {}
    for value in bits:
        if decoder == "affine":
            size = torch.exp2(-torch.arange(value, dtype=torch.float32)).view(-1, 1, 1)
            scale = size * (0.75 + 0.1 * normal(value, N, groups))
            decoders[value] = AffineDecoder(scale.half(), (0.1 * normal(N, groups)).half())
        elif decoder == "codebook":
            decoders[value] = CodebookDecoder(normal(N, 2**value).half())
        else:
            raise ValueError(f"unknown decoder {decoder!r}")
    return PlaneWeight(planes, decoders, K, group_size)
