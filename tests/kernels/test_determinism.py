"""A row's result depends on that row alone: not on its neighbours, the number of threads, or the run."""

from __future__ import annotations

import pytest
import torch
from helpers import random_weight
from instruction_sets import BEST, kernel_of

from bitstrata.kernels.cpu import FEW_ROWS

ALL_BITS = tuple(range(1, 9))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
N, K = 37, 301
INT8_ROWS = 3 * FEW_ROWS + 5  # of two precisions each has more than FEW_ROWS, of three some have
LAYOUTS = {f"group-{size}": ("affine", size) for size in (12, 32, 64, 128, 200)} | {
    "bytes-64": ("affine8", 64),
    "codebook": ("codebook", K),
}
# the plain kernels are the int8 ones; exact ones leave more than FEW_ROWS rows to torch's own product
KERNELS = sorted({(BEST, "int8"), (BEST, "exact"), ("scalar", "int8")}) if BEST else []

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not KERNELS, reason="the native kernels are not built"),
]
layouts = pytest.mark.parametrize(("scales", "group_size"), LAYOUTS.values(), ids=LAYOUTS.keys())


@pytest.fixture(params=KERNELS, ids="-".join)
def native(request):
    return kernel_of(*request.param)


def stored(scales, group_size, seed):
    return random_weight(N, K, ALL_BITS, group_size, scales, seed)


def activations(native, seed, dtype=torch.float32):
    """As many rows as this kernel computes alike in a call."""
    rows = INT8_ROWS if native.activations == "int8" else FEW_ROWS
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


@layouts
def test_a_row_of_a_batch_equals_that_row_alone(native, scales, group_size, seed):
    weight = stored(scales, group_size, seed)
    for dtype in DTYPES.values():
        x = activations(native, seed, dtype)
        for bits in ALL_BITS:
            together = native.linear(x, weight, bits)
            for row in (0, FEW_ROWS // 2, FEW_ROWS - 1, len(x) - 1):
                assert torch.equal(native.linear(x[row : row + 1], weight, bits)[0], together[row]), f"bits={bits}"
            assert torch.equal(native.linear(x[3:11], weight, bits), together[3:11]), f"bits={bits}"


@layouts
def test_rows_at_their_own_bits_equal_all_rows_at_these(native, scales, group_size, seed):
    weight, x = stored(scales, group_size, seed), activations(native, seed)
    uniform = {value: native.linear(x, weight, value) for value in ALL_BITS}
    for bits in ((2, 3, 4), (1, 5), ALL_BITS, (8,)):
        row_bits = torch.tensor(bits)[
            torch.randint(len(bits), (len(x),), generator=torch.Generator().manual_seed(seed))
        ]
        y = native.linear(x, weight, row_bits)
        for value in row_bits.unique().tolist():
            assert torch.equal(y[row_bits == value], uniform[value][row_bits == value]), f"bits={value} of {bits}"


@layouts
def test_weights_in_one_call_equal_weights_one_by_one(native, scales, group_size, seed):
    weights = [random_weight(rows, K, ALL_BITS, group_size, scales, seed + rows) for rows in (37, 40, 1, 16)]
    x = activations(native, seed)[: FEW_ROWS + 1]
    row_bits = torch.tensor([2, 5, 3])[torch.arange(len(x)) % 3]
    for bits in (1, 3, 4, 8, row_bits):
        for weight, y in zip(weights, native.linear_many(x, weights, bits), strict=True):
            alone = native.linear_many(x, [weight], bits)[0]
            assert torch.equal(y, alone), f"N={weight.out_features} bits={bits}"


@layouts
def test_neither_threads_nor_repetition_change_anything(native, threads, scales, group_size, seed):
    weight, x = stored(scales, group_size, seed), activations(native, seed)
    row_bits = torch.arange(len(x)) % 8 + 1
    threads(1)
    first = [native.linear(x, weight, bits) for bits in (1, 3, 8)] + [native.linear(x, weight, row_bits)]
    for count in (1, 2, 5, 2):
        threads(count)
        again = [native.linear(x, weight, bits) for bits in (1, 3, 8)] + [native.linear(x, weight, row_bits)]
        assert all(map(torch.equal, again, first)), f"{count} threads"
