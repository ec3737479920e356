"""Numbers that hurt: outliers, denormals, zeros, infinities and NaN in activations; odd scales, offsets and tables."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from helpers import random_weight

from bitstrata.kernels import pack
from bitstrata.planes import AffineScales, Codebook

N, K = 19, 301
BITS = (1, 3, 4, 6, 8)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {
    "group-32": ("affine", 32),
    "group-64": ("affine", 64),
    "group-200": ("affine", 200),
    "bytes-32": ("affine8", 32),
    "bytes-200": ("affine8", 200),
    "codebook": ("codebook", K),
}

layouts = pytest.mark.parametrize(("scales", "group_size"), LAYOUTS.values(), ids=LAYOUTS.keys())
pytestmark = pytest.mark.usefixtures("poisoned")


def make(scales="affine", group_size=64, seed=0):
    return random_weight(N, K, BITS, group_size, scales, seed)


def activations(rows, seed):
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(seed))


def check_both(promise, weight, x, label):
    """At each bits, and with rows at different bits."""
    for bits in BITS:
        promise(weight, bits)(pack(weight).linear(x, bits), x, label)
    row_bits = torch.tensor(BITS)[torch.arange(len(x)) % len(BITS)]
    y = pack(weight).linear(x, row_bits)
    for bits in row_bits.unique().tolist():
        promise(weight, bits)(y[row_bits == bits], x[row_bits == bits], f"{label}, mixed")


@layouts
def test_outliers(promise, scales, group_size, seed):
    weight = make(scales, group_size, seed)
    for rows, dtype in zip((1, 6, 18), DTYPES.values(), strict=True):
        x = activations(rows, seed)
        x[:, seed % K] = 1e3
        x[:, (seed + 150) % K] = -1e3
        check_both(promise, weight, x.to(dtype), "outliers")


@layouts
def test_an_outlier_spoils_its_own_chunk_only(scales, group_size, seed):
    weight, rest, spike = make(scales, group_size, seed), activations(1, seed), torch.zeros(1, K)
    rest[:, :256] = 0
    spike[:, 0] = 1e3
    for bits in BITS:
        together = pack(weight).linear(rest + spike, bits)
        apart = pack(weight).linear(rest, bits) + pack(weight).linear(spike, bits)
        # float32 leaves 1e-3 of results of about 1e3; one scale for both would be off by 1
        torch.testing.assert_close(together, apart, rtol=0, atol=0.01)


@layouts
def test_denormals_and_the_edge_of_zero(promise, scales, group_size, seed):
    """Rows of tiny activations alone give next to nothing, never NaN; among others they do no harm."""
    weight = make(scales, group_size, seed)
    for tiny in (1e-39, 1e-44, 5e-31, 2e-30):
        x = activations(4, seed)
        x[0] *= tiny
        x[1, ::2] *= tiny
        x[2, 200:] = tiny
        for bits in BITS:
            y = pack(weight).linear(x, bits)
            promise(weight, bits)(y[1:], x[1:], f"tiny={tiny}")
            exact = x[0].double().abs().sum() * 10
            assert y[0].abs().max() <= exact, f"tiny={tiny} bits={bits}"  # also false for NaN


def test_half_precision_denormals(promise, seed):
    x = (activations(5, seed) * 2**-20).half()
    assert (x.abs() < torch.finfo(torch.float16).smallest_normal).all()
    check_both(promise, make(seed=seed), x, "fp16 denormals")


@layouts
def test_a_row_of_zeros_gives_zeros(scales, group_size, seed):
    weight = make(scales, group_size, seed)
    for dtype in DTYPES.values():
        x = activations(17, seed).to(dtype)
        x[3] = 0
        for rows in (slice(3, 4), slice(0, 9), slice(0, 17)):
            for bits in BITS:
                y = pack(weight).linear(x[rows], bits)
                assert torch.equal(y[x[rows].abs().sum(1) == 0], torch.zeros(1, N, dtype=dtype))


@layouts
def test_a_row_that_is_not_finite_stays_alone(promise, scales, group_size, seed):
    """Nothing of it is passed off as a number, and the other rows are what they were."""
    weight = make(scales, group_size, seed)
    finite = torch.arange(7) != 4
    row_bits = torch.tensor([1, 3, 8, 4, 8, 6, 1])
    values, columns = (float("inf"), float("-inf"), float("nan")), (0, 130, K - 1)
    for dtype, (value, column) in product(DTYPES.values(), zip(values, columns, strict=True)):
        x = activations(7, seed).to(dtype)
        x[4, column] = value
        for bits in BITS:
            y = pack(weight).linear(x, bits)
            assert not y[4].isfinite().any()
            promise(weight, bits)(y[finite], x[finite], "beside a row that is not finite")
        y = pack(weight).linear(x, row_bits)
        assert not y[4].isfinite().any()
        assert y[finite].isfinite().all()
        assert not pack(weight).linear(x[4:5], 3).isfinite().any()


def negative(scale):
    return -scale


def random_signs(scale):
    return scale * (torch.rand(scale.shape, generator=torch.Generator().manual_seed(1)).round() * 2 - 1)


def some_zero(scale):
    scale = scale.clone()
    scale[0, ::2] = 0
    scale[-1, :, 0] = 0
    return scale


def all_zero(scale):
    return scale * 0


def denormal(scale):
    return scale.clamp(-1, 1) * 2**-20


def one_dominates(scale):
    scale = scale.clone() * 2**-12
    scale[-1] = 3
    return scale


def large(scale):
    return scale * 1000


SCALES = [negative, random_signs, some_zero, all_zero, denormal, one_dominates, large]


@pytest.mark.parametrize("change", SCALES, ids=lambda change: change.__name__)
def test_odd_scales(promise, change, seed):
    for group_size in (32, 200):
        weight = make("affine", group_size, seed)
        scales = {bits: AffineScales(change(d.scale.float()).half(), d.offset) for bits, d in weight.scales.items()}
        for rows in (1, 7, 17):
            check_both(promise, replace(weight, scales=scales), activations(rows, seed), f"group {group_size}")


@pytest.mark.parametrize("offset", [1000.0, -60000.0], ids=str)
def test_offsets_that_dwarf_the_scales(promise, offset, seed):
    weight = make(seed=seed)
    scales = {
        bits: AffineScales((d.scale.float() * 2**-8).half(), torch.full_like(d.offset, offset))
        for bits, d in weight.scales.items()
    }
    for rows in (1, 7, 17):
        check_both(promise, replace(weight, scales=scales), activations(rows, seed), "offset")


TABLES = {
    "constant": lambda table: torch.full_like(table, 0.3),
    "zero": lambda table: table * 0,
    "one-outlier": lambda table: torch.cat([table[:, :1] * 0 + 500, table[:, 1:]], 1),
    "negative": lambda table: -table.abs(),
    "huge": lambda table: table.clamp(-3, 3) * 20000,
    "denormal": lambda table: table.clamp(-1, 1) * 2**-20,
}


@pytest.mark.parametrize("change", TABLES.values(), ids=TABLES.keys())
def test_odd_tables(promise, change, seed):
    weight = make("codebook", K, seed)
    scales = {bits: Codebook(change(d.table.float()).half()) for bits, d in weight.scales.items()}
    for rows in (1, 7, 17):
        check_both(promise, replace(weight, scales=scales), activations(rows, seed), "table")
