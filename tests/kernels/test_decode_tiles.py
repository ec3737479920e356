"""Decoded tiles are those of planes.decode, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from helpers import random_weight
from instruction_sets import ISAS

from bitstrata.kernels import pack
from bitstrata.kernels.cpu import blocked as module
from bitstrata.planes import AffineScales, Codebook, decode

ALL_BITS = tuple(range(1, 9))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
N, K = 53, 301

pytestmark = pytest.mark.skipif(not ISAS, reason="the native kernels are not built")
isas = pytest.mark.parametrize("isa", ISAS)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def tile(isa, packed, bits, first, last, dtype, threads=1):
    """Rows first..last-1 as `isa` decodes them; nothing is written beyond."""
    guard, columns = 64, packed.in_features
    flat = torch.full(((last - first) * columns + guard,), float("nan"), dtype=dtype)
    packed.handle.decode(isa, bits, first, last, flat.data_ptr(), module.TYPES[dtype], threads)
    assert flat[-guard:].isnan().all(), "written beyond the tile"
    return flat[:-guard].view(last - first, columns)


def assert_same_bits(found, expected, message):
    integers = torch.int32 if expected.dtype == torch.float32 else torch.int16
    assert torch.equal(found.contiguous().view(integers), expected.contiguous().view(integers)), message


@isas
@pytest.mark.parametrize(
    "group_size", [1, 12, 32, 43, 64, 100, 128, 200, K, "codebook"], ids=lambda size: f"group-{size}"
)
def test_all_bits_and_groups(isa, group_size, seed):
    codebook = group_size == "codebook"
    weight = random_weight(N, K, ALL_BITS, K if codebook else group_size, "codebook" if codebook else "affine", seed)
    packed = pack(weight, kernel=ISAS[0])
    for bits, dtype in product(ALL_BITS, DTYPES.values()):
        expected = decode(weight, bits, dtype)
        for first, last in ((0, N), (0, 16), (16, 48), (48, N), (16, 16)):
            found = tile(isa, packed, bits, first, last, dtype)
            assert_same_bits(found, expected[first:last], f"{dtype} bits={bits} rows {first}..{last}")


@isas
@pytest.mark.parametrize("scales", ["affine", "affine8", "codebook"])
def test_shapes(isa, scales, seed):
    for shape in ((1, 1), (1, 129), (16, 128), (17, 31), (33, 256)):
        weight = random_weight(*shape, ALL_BITS, 32, scales, seed)
        packed = pack(weight, kernel=ISAS[0])
        for bits, dtype in product(ALL_BITS, DTYPES.values()):
            found = tile(isa, packed, bits, 0, shape[0], dtype, threads=2)
            assert_same_bits(found, decode(weight, bits, dtype), f"{shape} {dtype} bits={bits}")


@isas
@pytest.mark.parametrize("factor", [2.0**-22, 2.0**-14, 30000.0], ids=["denormal", "edge-of-normal", "overflow"])
def test_rounding_at_the_ends_of_the_range(isa, factor, seed):
    """Scales that are fp16 denormals; weights that are; weights beyond what fp16 holds, which become infinite."""
    affine, codebook = random_weight(N, K, ALL_BITS, 43, seed=seed), random_weight(N, K, ALL_BITS, K, "codebook", seed)

    def large(tensor):
        return (tensor.float() * factor).clamp(-60000, 60000).half()

    affine = replace(
        affine, scales={b: AffineScales(large(d.scale), large(d.offset)) for b, d in affine.scales.items()}
    )
    codebook = replace(codebook, scales={b: Codebook(large(d.table)) for b, d in codebook.scales.items()})
    for weight in (affine, codebook):
        packed = pack(weight, kernel=ISAS[0])
        for bits, dtype in product(ALL_BITS, DTYPES.values()):
            found = tile(isa, packed, bits, 0, N, dtype)
            assert_same_bits(found, decode(weight, bits, dtype), f"{dtype} bits={bits}")


def test_what_cannot_be_decoded_is_refused():
    packed = pack(random_weight(N, K), kernel=ISAS[0])
    out = torch.empty(N, K)

    def call(bits=2, first=0, last=N, kind=0):
        packed.handle.decode(ISAS[0], bits, first, last, out.data_ptr(), kind, 1)

    call()
    for rows in ({"first": 8}, {"last": N + 1}, {"first": -16}, {"first": 32, "last": 16}, {"last": 37}):
        with pytest.raises(IndexError, match="rows to decode"):
            call(**rows)
    for bits in (-1, 0, 1, 5, 9):
        with pytest.raises(ValueError, match="no scales for these bits"):
            call(bits=bits)
    with pytest.raises(ValueError, match="unknown type"):
        call(kind=3)


@dtypes
def test_many_rows_meet_few_shapes_of_matrix_products(dtype, monkeypatch):
    """In 16 bits every new number of rows costs memory that never comes back; in fp32 it does not."""
    packed = pack(random_weight(N, K), kernel=f"{ISAS[0]}-exact")
    seen = set()
    linear = torch.nn.functional.linear

    def watched(x, weight):
        seen.add(x.shape[0])
        return linear(x, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    for rows in range(module.FEW_ROWS + 1, 101):
        x = torch.randn(rows, K).to(dtype)
        y = packed.linear(x, 3)
        assert y.shape == (rows, N)
        alone = packed.linear(torch.cat([x[-1:], x]), 3)[0]  # the last row in another place
        torch.testing.assert_close(y[-1], alone, rtol=0.02, atol=0.02)
    assert seen == (set(range(17, 102)) if dtype == torch.float32 else {32, 64, 96, 128})
