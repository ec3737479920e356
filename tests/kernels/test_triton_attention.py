"""Attention of a graph step against float64, on a GPU, or in Triton's interpreter (test_triton_interpreter.py)."""

from __future__ import annotations

import math
import os

import pytest
import torch

from bitstrata.kernels import attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
pytestmark = [
    pytest.mark.skipif(
        DEVICE == "cpu" and not INTERPRETED,
        reason="no CUDA device; test_triton_interpreter.py runs these in the interpreter",
    ),
    pytest.mark.usefixtures("poisoned"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TOKENS, LONGEST = 720, 513
SHAPES = {  # key heads, query heads for each, width of keys, of values
    "grouped": (2, 3, 16, 16),
    "alone": (3, 1, 64, 64),
    "odd-widths": (1, 2, 12, 20),
    "wide": (1, 5, 128, 128),
    "many-heads": (1, 17, 8, 8),
}
# (start, length) in the pool: one token, around a step, around chunks of 512, padding
PLACES = [(0, 1), (16, 64), (96, 65), (176, 0), (192, 513)]


class Rows:
    """A cache in which nothing but the rows' own earlier tokens is finite, and the rows' new tokens."""

    def __init__(self, shape, dtype, seed, places=PLACES):
        heads, groups, width, width_v = shape
        chance = torch.Generator().manual_seed(seed)
        self.places = places
        draw = [torch.randn(n, TOKENS, w, generator=chance) for n, w in ((heads, width), (heads, width_v))]
        earlier = torch.zeros(TOKENS, dtype=torch.bool)
        for start, length in self.places:
            earlier[start : start + max(0, length - 1)] = True
        held = [torch.where(earlier[:, None], part, torch.nan).to(dtype).to(DEVICE) for part in draw]
        self.keys, self.values = held
        rows = len(self.places)
        # as models make them: [1, rows, heads, width] transposed
        new = [torch.randn(rows, n, w, generator=chance).to(dtype).transpose(0, 1) for n, w in (
            (heads * groups, width), (heads, width), (heads, width_v))]  # fmt: skip
        self.query, self.key, self.value = (part.to(DEVICE) for part in new)
        self.starts, self.lengths = (torch.tensor(part, device=DEVICE) for part in zip(*self.places, strict=True))

    def run(self, **settings):
        """What the kernels make of it, after the cache was written."""
        attention.append(self.keys, self.values, self.key, self.value, self.starts, self.lengths)
        return attention.attend(
            self.query, self.keys, self.values, self.starts, self.lengths, longest=LONGEST, **settings
        )

    def expected(self, row, dtype, scale=None, window=None, softcap=None):
        """Row `row` in `dtype`, by the formula: [H, D']."""
        start, length = self.places[row]
        seen = slice(start + max(0, length - (window or length)), start + length)
        groups = len(self.query) // len(self.keys)
        q = self.query[:, row].to(dtype)
        k, v = (held[:, seen].to(dtype).repeat_interleave(groups, 0) for held in (self.keys, self.values))
        scores = (k @ q[:, :, None])[..., 0] * (q.shape[1] ** -0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        return (scores.softmax(-1)[:, None] @ v)[:, 0]

    def check(self, result, **settings):
        assert result.dtype == self.query.dtype
        eps = torch.finfo(result.dtype).eps
        for row, (_, length) in enumerate(self.places):
            if not length:
                assert (result[row] == 0).all()
                continue
            exact = self.expected(row, torch.float64, **settings)
            # weights and result are rounded once each; scores in float32 differ by a few of its last digits
            bound = (2 * eps + 64 * torch.finfo(torch.float32).eps) * float(
                self.values.double().nan_to_num().abs().max()
            )
            error = float((result[row].double() - exact).abs().max())
            assert error <= bound, f"row {row} of length {length}: {error} is more than {bound}"


EACH = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]


@pytest.mark.parametrize(("shape", "dtype"), EACH[::2] if INTERPRETED else EACH)
def test_every_row_sees_its_own_range(shape, dtype, seed):
    rows = Rows(SHAPES[shape], DTYPES[dtype], seed)
    before = rows.keys.clone(), rows.values.clone()
    rows.check(rows.run())
    for held, old, new in zip((rows.keys, rows.values), before, (rows.key, rows.value), strict=True):
        for row, (start, length) in enumerate(rows.places):
            if length:
                assert torch.equal(held[:, start + length - 1], new[:, row])
                old[:, start + length - 1] = new[:, row]
        torch.testing.assert_close(held, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("window", [1, 20, 512])
def test_windows(window, seed):
    rows = Rows(SHAPES["grouped"], torch.float32, seed)
    rows.check(rows.run(window=window), window=window)


@pytest.mark.parametrize("settings", [{"softcap": 2.0}, {"scale": 0.7}, {"softcap": 5.0, "scale": 3.0, "window": 30}])
def test_scales_and_caps(settings, seed):
    rows = Rows(SHAPES["grouped"], torch.float32, seed)
    rows.check(rows.run(**settings), **settings)


def test_a_row_is_the_same_in_any_company_and_under_any_bound(seed):
    """Also where no row needs a second chunk, which is another program."""
    for window in (None, 40):
        rows = Rows(SHAPES["wide"], torch.bfloat16, seed)
        together = rows.run(window=window)
        for row, (_, length) in enumerate(rows.places):
            if length:
                one = attention.attend(
                    rows.query[:, row : row + 1], rows.keys, rows.values,
                    rows.starts[row : row + 1], rows.lengths[row : row + 1],
                    longest=512 * math.ceil(length / 512), window=window,
                )  # fmt: skip
                assert torch.equal(one[0], together[row])


def test_rows_of_one_range_see_those_before_them(seed):
    """The drafts of one text: each row one token longer, all of them new."""
    rows = Rows(SHAPES["grouped"], torch.float32, seed, [(32, length) for length in (7, 8, 9)])
    rows.keys[:, 38:], rows.values[:, 38:] = torch.nan, torch.nan
    rows.check(rows.run())


def test_a_row_that_is_not_finite_stays_alone(seed):
    rows = Rows(SHAPES["grouped"], torch.float32, seed)
    rows.query[:, 2] = torch.nan
    result = rows.run()
    assert result[2].isnan().all()
    assert result[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("shape", ["grouped", "odd-widths"])
def test_the_reference_is_the_same(shape, seed):
    rows, other = (Rows(SHAPES[shape], torch.float32, seed) for _ in range(2))
    attention.append_reference(other.keys, other.values, other.key, other.value, other.starts, other.lengths)
    settings = {"window": 100, "softcap": 3.0}
    found = attention.attend_reference(
        other.query, other.keys, other.values, other.starts, other.lengths, longest=LONGEST, **settings
    )
    torch.testing.assert_close(rows.run(**settings), found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows.keys, other.keys, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(rows.values, other.values, rtol=0, atol=0, equal_nan=True)
