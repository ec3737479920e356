"""Both operations against float64, with shapes that hurt; how near they must be is the kernel's own promise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import assert_linear_close, random_weight
from instruction_sets import BEST, DISTINCT

from bitstrata.kernels import pack
from bitstrata.planes import decode

ROWS = (1, 2, 7, 8, 9, 16, 17, 33)
SOME_ROWS = (1, 9, 17)
ALL_BITS = tuple(range(1, 9))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
N, K = 37, 301

LAYOUTS = [
    *(("affine", size) for size in (12, 32, 43, 64, 100, 128, 200, K)),
    *(("affine8", size) for size in (32, 43, 128, 200)),
    ("codebook", K),
]

# in 16 bits only what is read and written differs, which no layout has a part in
CASES = [
    *(("fp32", *layout) for layout in LAYOUTS),
    *((dtype, *layout) for dtype in ("bf16", "fp16") for layout in (("affine", 43), ("affine8", 128), ("codebook", K))),
]
cases = pytest.mark.parametrize(
    ("dtype", "scales", "group_size"),
    [(DTYPES[dtype], *layout) for dtype, *layout in CASES],
    ids=[f"{dtype}-{scales}-{'K' if size == K else size}" for dtype, scales, size in CASES],
)
# what the ops do before they come to a kernel
once = pytest.mark.parametrize("kernel", [DISTINCT[0], *DISTINCT[1:2]], indirect=True)
KINDS = ("affine", "affine8", "codebook")
pytestmark = pytest.mark.usefixtures("poisoned")


def make(scales, group_size, seed, n=N, k=K):
    return random_weight(n, k, ALL_BITS, group_size, scales, seed)


def activations(rows, dtype, seed, k=K):
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def row_bits_for(rows, seed, bits=ALL_BITS):
    chosen = torch.randint(len(bits), (rows,), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(bits, dtype=torch.int8)[chosen]


def rows_for(kernel, dtype):
    """Dtypes differ only in how activations are read and results written; the reference has no loops of its own."""
    return ROWS if dtype == torch.float32 and kernel != "reference" else SOME_ROWS


@pytest.fixture
def check_rows(promise):
    """Per-row results, checked together for each bits value that occurs."""

    def check(y, x, row_bits, weight, label):
        for bits in row_bits.unique().tolist():
            chosen = row_bits == bits
            promise(weight, bits)(y[chosen], x[chosen], label)

    return check


@cases
def test_all_bits_and_rows(kernel, promise, scales, group_size, dtype, seed):
    weight = make(scales, group_size, seed)
    for bits in ALL_BITS:
        check = promise(weight, bits)
        for rows in rows_for(kernel, dtype):
            x = activations(rows, dtype, seed + rows)
            check(pack(weight).linear(x, bits), x, "uniform")


@cases
def test_each_row_at_its_own_bits(kernel, check_rows, scales, group_size, dtype, seed):
    weight = make(scales, group_size, seed)
    for rows in rows_for(kernel, dtype):
        x, row_bits = activations(rows, dtype, seed + rows), row_bits_for(rows, seed + rows)
        check_rows(pack(weight).linear(x, row_bits), x, row_bits, weight, f"of {rows} mixed rows")


@cases
@pytest.mark.skipif(not BEST, reason="the native kernels are not built")
@pytest.mark.parametrize("kernel", [BEST, f"{BEST}-exact"], indirect=True)
def test_more_rows_than_a_pass(promise, check_rows, scales, group_size, dtype, seed):
    weight = make(scales, group_size, seed)
    for rows in (17, 33, 64, 65):
        x, row_bits = activations(rows, dtype, seed + rows), row_bits_for(rows, seed + rows)
        for bits in ALL_BITS:
            promise(weight, bits)(pack(weight).linear(x, bits), x, "uniform")
        check_rows(pack(weight).linear(x, row_bits), x, row_bits, weight, f"of {rows} mixed rows")


@pytest.mark.parametrize("shape", [(1, 1), (1, 32), (3, 31), (8, 33), (16, 128), (65, 64), (129, 257)], ids=str)
def test_widths_around_words_and_tiles(promise, shape, seed):
    n, k = shape
    for scales in KINDS:
        weight = make(scales, 32, seed, n, k)
        x = activations(5, torch.float32, seed, k)
        for bits in ALL_BITS:
            promise(weight, bits)(pack(weight).linear(x, bits), x, scales)


@pytest.mark.parametrize(("scales", "dtype"), list(zip(KINDS, DTYPES.values(), strict=True)), ids=KINDS)
def test_a_row_of_a_batch_is_as_near_as_that_row_alone(promise, scales, dtype, seed):
    weight = make(scales, 43, seed)
    x, row_bits = activations(17, dtype, seed), row_bits_for(17, seed, (2, 3, 4))
    together = pack(weight).linear(x, row_bits)
    for row, bits in enumerate(row_bits.tolist()):
        one = slice(row, row + 1)
        check = promise(weight, bits)
        for label, y in {
            "rows op, alone": pack(weight).linear(x[one], row_bits[one]),
            "plain op, alone": pack(weight).linear(x[one], bits),
            "plain op, batch": pack(weight).linear(x, bits)[one],
            "rows op, batch": together[one],
        }.items():
            check(y, x[one], f"row {row}: {label}")


def non_contiguous(kind, seed):
    x = activations(2 * 9, torch.float32, seed, 2 * K)
    return {
        "columns": lambda: x[:, ::2],
        "rows": lambda: x[::2, :K],
        "overlapping": lambda: x.flatten()[1:].as_strided((9, K), (K - 2, 1)),
        "transposed": lambda: activations(K, torch.float32, seed, 9).T,
        "expanded": lambda: x[:1, :K].expand(9, K),
        "middle-of-three": lambda: x[:, :K].reshape(2, 9, K).transpose(0, 1),
    }[kind]()


@once
@pytest.mark.parametrize("kind", ["columns", "rows", "overlapping", "transposed", "expanded", "middle-of-three"])
def test_non_contiguous_activations(promise, check_rows, kind, seed):
    x, weight = non_contiguous(kind, seed), make("affine", 43, seed)
    assert not x.is_contiguous()
    rows = x.shape[:-1].numel()
    promise(weight, 3)(pack(weight).linear(x, 3), x, kind)
    row_bits = row_bits_for(rows, seed)
    y = pack(weight).linear(x, row_bits)
    check_rows(y.reshape(rows, N), x.reshape(rows, K), row_bits, weight, kind)


@once
def test_row_bits_may_be_a_strided_view_of_any_integer_type(check_rows, seed):
    x, weight = activations(9, torch.float32, seed), make("affine", 43, seed)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        row_bits = row_bits_for(18, seed).to(dtype)[::2]
        check_rows(pack(weight).linear(x, row_bits), x, row_bits, weight, f"strided {dtype}")


@once
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 3), (0,), (0, 4), (4, 0)], ids=str)
def test_any_leading_dimensions(promise, leading, seed):
    weight = make("affine", 43, seed)
    x = torch.randn(*leading, K, generator=torch.Generator().manual_seed(seed))
    promise(weight, 3)(pack(weight).linear(x, 3), x, "uniform")
    rows = x.shape[:-1].numel()
    promise(weight, 3)(pack(weight).linear(x, torch.full((rows,), 3)), x, "rows")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("plane", [0, 1])
def test_the_bound_notices_one_wrong_sign(dtype, plane, seed, monkeypatch):
    """The check of the checks: a single flipped plane bit of one weight is an error."""
    monkeypatch.setenv("BITSTRATA_KERNEL", "reference")
    weight = make("affine", 32, seed, 9, 33)
    x = activations(33, dtype, seed, 33)
    wrong = [p.clone() for p in weight.planes]
    wrong[plane][seed % 9, 0] ^= 1 << (seed % 31)
    y = pack(replace(weight, planes=tuple(wrong))).linear(x, 3)
    with pytest.raises(AssertionError, match="flipped: error"):
        assert_linear_close(y, x, decode(weight, 3, torch.float64), "flipped")
