"""decode and codes against loops written from the definition, one weight at a time."""

from __future__ import annotations

import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import random_weight
from hypothesis import given
from hypothesis import strategies as st
from randomness import examples

from bitstrata.planes import AffineScales, ByteScales, PlaneWeight, codes, decode, pack_bits, signs, unpack_bits

BITS = st.sets(st.integers(1, 8), min_size=1, max_size=4).map(sorted).map(tuple)
WEIGHTS = st.builds(
    random_weight,
    N=st.integers(1, 3),
    K=st.one_of(st.sampled_from([1, 31, 32, 33, 64, 70]), st.integers(1, 90)),
    bits=BITS,
    group_size=st.one_of(st.sampled_from([1, 32, 43, 128]), st.integers(1, 100)),
    kind=st.sampled_from(["affine", "affine8", "codebook"]),
    seed=st.integers(0, 2**31),
)


def stored_bit(weight, plane, n, k):
    word = weight.planes[plane][n, k // 32].item()
    return (word >> (k % 32)) & 1


def naive_decode(weight, bits, number):
    """The formulas of the format, in arithmetic of type `number`, as a list of rows."""
    scales = weight.scales[bits]
    rows = []
    for n in range(weight.out_features):
        row = []
        for k in range(weight.in_features):
            if isinstance(scales, ByteScales):  # a coefficient is one number of fp16, so exact in all of these
                j = k // weight.group_size
                unit = Fraction(scales.unit[n].item()) / 128
                value = number(unit * scales.offset[n, j].item())
                for i in range(bits):
                    scale = number(unit * scales.scale[i, n, j].item() / 2**i)
                    value = value + scale if stored_bit(weight, i, n, k) else value - scale
            elif isinstance(scales, AffineScales):
                j = k // weight.group_size
                value = number(scales.offset[n, j].item())
                for i in range(bits):
                    scale = number(scales.scale[i, n, j].item())
                    value = value + scale if stored_bit(weight, i, n, k) else value - scale
            else:
                text = "".join(str(stored_bit(weight, i, n, k)) for i in range(bits))
                value = number(scales.table[n, int(text, 2)].item())
            row.append(value)
        rows.append(row)
    return rows


@examples(40)
@given(WEIGHTS)
def test_decode_equals_the_naive_loop_bit_for_bit(weight):
    for bits in weight.bits:
        for dtype, number in ((torch.float64, np.float64), (torch.float32, np.float32)):
            expected = torch.from_numpy(np.array(naive_decode(weight, bits, number)))
            decoded = decode(weight, bits, dtype)
            assert decoded.dtype == dtype
            assert torch.equal(decoded, expected), (bits, dtype)


@examples(10)
@given(WEIGHTS)
def test_float64_decode_is_exact(weight):
    for bits in weight.bits:
        assert decode(weight, bits, torch.float64).tolist() == naive_decode(weight, bits, Fraction)


def test_float64_decode_is_exact_at_the_ends_of_float16():
    largest, smallest = 65504.0, 2.0**-24
    scale = torch.tensor([largest, smallest, 1.0, largest, smallest, largest, largest, largest]).half().view(8, 1, 1)
    planes = tuple(pack_bits(torch.tensor([[True, i % 2 == 0]])) for i in range(8))
    weight = PlaneWeight(planes, {8: AffineScales(scale, torch.tensor([[smallest]]).half())}, 2, 2)
    assert decode(weight, 8, torch.float64).tolist() == naive_decode(weight, 8, Fraction)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scales", ["affine", "affine8", "codebook"])
def test_low_precision_is_the_float32_result_rounded_once(scales, dtype, seed):
    weight = random_weight(5, 70, bits=(1, 4, 8), group_size=43, kind=scales, seed=seed)
    for bits in weight.bits:
        assert torch.equal(decode(weight, bits, dtype), decode(weight, bits, torch.float32).to(dtype))


@examples(30)
@given(WEIGHTS)
def test_lower_bits_do_not_depend_on_higher_planes_and_scales(weight):
    for bits in weight.bits:
        alone = PlaneWeight(weight.planes[:bits], {bits: weight.scales[bits]}, weight.in_features, weight.group_size)
        cut = weight.prefix(bits)
        assert len(cut.planes) == bits
        assert cut.bits == tuple(b for b in weight.bits if b <= bits)
        for other in (alone, cut):
            assert torch.equal(decode(other, bits, torch.float64), decode(weight, bits, torch.float64))


def test_adding_a_plane_and_a_scales_changes_no_lower_bits(seed):
    small = random_weight(4, 70, bits=(2, 3), seed=seed)
    other = random_weight(4, 70, bits=(5,), seed=seed + 1)
    large = PlaneWeight(small.planes + other.planes[3:], {**small.scales, **other.scales}, 70, 32)
    for bits in small.bits:
        assert torch.equal(decode(large, bits), decode(small, bits))


def test_prefix_keeps_the_next_lower_scales_and_refuses_when_none_is_left():
    weight = random_weight(2, 33, bits=(2, 4))
    assert weight.prefix(3).bits == (2,)
    assert len(weight.prefix(3).planes) == 2
    assert weight.prefix(8).bits == (2, 4)
    with pytest.raises(ValueError, match="no scales at or below 1"):
        weight.prefix(1)


def test_decode_of_a_group_far_wider_than_the_row_allocates_only_the_row(seed):
    weight = random_weight(3, 70, group_size=70, seed=seed)
    wide = PlaneWeight(weight.planes, weight.scales, 70, 2**31 - 1)
    assert torch.equal(decode(wide, 3), decode(weight, 3))


@pytest.mark.parametrize("chunk", [1, 70, 150, 1000])
@pytest.mark.parametrize("scales", ["affine", "affine8", "codebook"])
def test_decoding_a_few_rows_at_a_time_changes_nothing(scales, chunk, seed, monkeypatch):
    weight = random_weight(9, 70, group_size=43, kind=scales, seed=seed)
    whole = decode(weight, 3, torch.float64)
    monkeypatch.setattr(sys.modules["bitstrata.planes.decode"], "CHUNK", chunk)
    assert torch.equal(decode(weight, 3, torch.float64), whole)


def test_decode_of_no_rows():
    assert decode(random_weight(0, 70), 3).shape == (0, 70)
    assert decode(random_weight(0, 70, kind="codebook"), 3).shape == (0, 70)


def test_decode_without_that_scales_is_a_key_error():
    with pytest.raises(KeyError):
        decode(random_weight(2, 33, bits=(2, 4)), 3)


@examples(30)
@given(WEIGHTS)
def test_codes_of_fewer_bits_are_the_high_bits(weight):
    most = len(weight.planes)
    full = codes(weight, most)
    assert full.dtype == torch.int64
    for bits in range(1, most + 1):
        assert torch.equal(codes(weight, bits), full >> (most - bits))


def test_plane_0_is_the_most_significant_bit_of_the_code():
    planes = tuple(pack_bits(torch.tensor([row]).bool()) for row in ([0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0]))
    weight = PlaneWeight(planes, random_weight(1, 4, bits=(3,)).scales, 4, 32)
    assert codes(weight, 3).tolist() == [[0b011, 0b101, 0b110, 0]]
    assert codes(weight, 2).tolist() == [[0b01, 0b10, 0b11, 0]]


def test_codes_beyond_the_planes_are_refused():
    with pytest.raises(IndexError):
        codes(random_weight(1, 4, bits=(3,)), 4)


def test_signs_are_minus_and_plus_one(seed):
    weight = random_weight(3, 70, seed=seed)
    for plane in range(4):
        expected = torch.where(unpack_bits(weight.planes[plane], 70), 1, -1)
        assert torch.equal(signs(weight, plane), expected.to(torch.int8))
        assert torch.equal(signs(weight, plane, torch.float64), expected.double())
