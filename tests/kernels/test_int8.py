"""What int8 activations cost: no more than roundings must, and checks that notice when it is more."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import random_weight
from instruction_sets import ISAS, kernel_of
from kernel_errors import FINE_BITS, assert_int8_close, assert_int8_typical, fewest_levels

from bitstrata.planes import AffineScales, Codebook, PlaneWeight, decode, group_count, pack_bits

ALL_BITS = tuple(range(1, 9))
N, K = 96, 1100  # eight units and a part of one

pytestmark = pytest.mark.skipif(not ISAS, reason="the native kernels are not built")


@pytest.fixture(params=ISAS)
def int8(request):
    """A kernel that quantizes activations whatever the number of rows."""
    return kernel_of(request.param, "int8")


@pytest.fixture
def loosest():
    """The one that promises least: what is noticed of it is noticed of the others."""
    return min((kernel_of(isa, "int8") for isa in ISAS), key=fewest_levels)


def gaussian(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("group_size", [32, 64, 128, 200, "codebook"], ids=lambda size: f"group-{size}")
def test_the_error_is_that_of_rounding(int8, group_size, seed):
    codebook = group_size == "codebook"
    # a codebook of two entries makes results that differ by little more than a factor: too few for a statistic
    bits_values = ALL_BITS[1:] if codebook else ALL_BITS
    kind = ("codebook", K) if codebook else ("affine", group_size)
    weight = random_weight(N, K, bits_values, kind[1], kind[0], seed)
    x, packed = gaussian(16, K, seed), int8.pack(weight)
    for bits in bits_values:
        y = int8.linear(x, packed, bits)
        assert_int8_typical(y, x, weight, bits, fewest_levels(int8), f"bits={bits}")


# of the results' own RMS: 0.3 % from activations, the rest from levels, of which avx2 has half as many
RELATIVE_ERROR = {
    ("affine", False): 0.006,
    ("affine", True): 0.009,
    ("affine8", False): 0.006,
    ("affine8", True): 0.009,
    ("codebook", False): 0.012,
    ("codebook", True): 0.018,
}


@pytest.mark.parametrize("scales", ["affine", "affine8", "codebook"])
def test_the_error_is_below_about_one_percent(int8, scales, seed):
    weight = random_weight(N, K, ALL_BITS[1:], 128, scales, seed)
    x = gaussian(64, K, seed)
    exact = kernel_of(int8.isa, "exact")
    limit = RELATIVE_ERROR[scales, int8.isa == "avx2"]
    for bits in weight.bits:
        y, true = int8.linear(x, weight, bits), exact.linear(x, weight, bits)
        least = 0.001 if bits < FINE_BITS else 0.0003
        assert least < (y - true).norm() / true.norm() < limit, f"bits={bits}"


@pytest.mark.parametrize("group_size", [32, 64, 128, 200], ids=lambda size: f"group-{size}")
def test_from_seven_bits_on_activations_cost_nothing(int8, group_size, seed):
    """Of weights that fall on whole levels, so that nothing else is rounded."""
    generator = torch.Generator().manual_seed(seed)
    planes = tuple(pack_bits(torch.rand(N, K, generator=generator) < 0.5) for _ in ALL_BITS)
    groups = group_count(K, group_size)
    for bits in (4, 6, 7, 8):
        scale = torch.exp2(-torch.arange(bits).float()).view(-1, 1, 1).expand(bits, N, groups)
        scales = AffineScales(scale.half().contiguous(), torch.zeros(N, groups).half())
        packed = int8.pack(PlaneWeight(planes[:bits], {bits: scales}, K, group_size))
        for rows in (5, 40):
            x = gaussian(rows, K, seed)
            true = x.double() @ decode(packed.stored(), bits, torch.float64).T
            error = (packed.linear(x, bits) - true).norm() / true.norm()
            low, high = (0.0015, 0.005) if bits < FINE_BITS else (0, 0.00006)
            assert low < error < high, f"bits={bits} rows={rows}: {error:.5f}"


def without_plane(weight, bits, plane):
    planes = [p.clone() for p in weight.planes]
    planes[plane].zero_()
    return replace(weight, planes=tuple(planes))


def with_scales(weight, bits, **change):
    return replace(weight, scales={**weight.scales, bits: replace(weight.scales[bits], **change)})


def scaled(factor, part=slice(None)):
    def change(weight, bits):
        scales = weight.scales[bits]
        if isinstance(scales, Codebook):
            return with_scales(weight, bits, table=(scales.table.float() * factor).half())
        scale = scales.scale.float()
        scale[part] *= factor
        return with_scales(weight, bits, scale=scale.half())

    return change


TYPICAL_FAULTS = {
    "all-scales-1%": (scaled(1.01), "affine"),
    "all-scales-1%-less": (scaled(0.99), "affine"),
    "all-entries-1%": (scaled(1.01), "codebook"),
    "first-plane-2%": (scaled(1.02, 0), "affine"),
    "last-group-10%": (scaled(1.1, (slice(None), slice(None), -1)), "affine"),
    "one-row-10%": (scaled(1.1, (slice(None), 5)), "affine"),
    "no-offset": (lambda w, bits: with_scales(w, bits, offset=torch.zeros_like(w.scales[bits].offset)), "affine"),
    "groups-swapped": (lambda w, bits: with_scales(w, bits, scale=w.scales[bits].scale.flip(-1)), "affine"),
    "last-plane-lost": (lambda w, bits: without_plane(w, bits, bits - 1), "affine"),
}


@pytest.mark.parametrize("fault", TYPICAL_FAULTS)
def test_the_statistic_notices(loosest, fault, seed):
    change, scales = TYPICAL_FAULTS[fault]
    weight = random_weight(N, K, (4,), 128, scales, seed)
    x = gaussian(16, K, seed)
    y = loosest.linear(x, change(weight, 4), 4)
    with pytest.raises(AssertionError, match=r"faulty: (RMS error|off by a factor)"):
        assert_int8_typical(y, x, weight, 4, fewest_levels(loosest), "faulty")


def flipped(weight, x, plane):
    """The bit of row 3's weight that the largest activation meets is the other one."""
    column = int(x.abs().amax(0).argmax())
    planes = [p.clone() for p in weight.planes]
    planes[plane][3, column // 32] ^= -(2**31) if column % 32 == 31 else 1 << column % 32
    return replace(weight, planes=tuple(planes))


WORST_FAULTS = {
    "bit-of-plane-0": lambda w, x: flipped(w, x, 0),
    "bit-of-plane-1": lambda w, x: flipped(w, x, 1),
    "no-offset": lambda w, x: with_scales(w, 3, offset=torch.zeros_like(w.scales[3].offset)),
    "scales-8%": lambda w, x: scaled(1.08)(w, 3),
    "other-scales": lambda w, x: replace(w, scales={3: AffineScales(w.scales[3].scale.roll(1, 1), w.scales[3].offset)}),
}


@pytest.mark.parametrize("fault", WORST_FAULTS)
def test_the_bound_notices(loosest, fault, seed):
    weight = random_weight(9, 33, (3,), 32, "affine", seed)
    x = gaussian(33, 33, seed)
    y = loosest.linear(x, WORST_FAULTS[fault](weight, x), 3)
    with pytest.raises(AssertionError, match="faulty: error"):
        assert_int8_close(y, x, weight, 3, fewest_levels(loosest), "faulty")
