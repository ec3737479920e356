"""Nested round-to-nearest against the textbook's formula and its own promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitstrata.planes import AffineScales, codes, decode
from bitstrata.solvers import RTN

seeds = st.integers(0, 2**31 - 1)


def draw(seed: int, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) + torch.randn(rows, 1, generator=generator)


def textbook(w: np.ndarray, bits: int, half: np.ndarray, middle: np.ndarray, group_size: int) -> np.ndarray:
    """Asymmetric round-to-nearest, one weight at a time, on the grid whose half-step and middle are stored."""
    result = np.empty_like(w, dtype=np.float64)
    for row, column in np.ndindex(*w.shape):
        step = 2 * float(half[row, column // group_size])
        lowest = float(middle[row, column // group_size]) - step * (2**bits - 1) / 2
        level = 0 if step == 0 else int(np.clip(np.rint((w[row, column] - lowest) / step), 0, 2**bits - 1))
        result[row, column] = lowest + step * level
    return result


@pytest.mark.parametrize("bits", range(1, 9))
def test_one_bits_value_is_textbook_round_to_nearest(bits: int, seed: int) -> None:
    w = draw(seed, 4, 70)
    weight = RTN().solve_layer(w, (bits,), 32)
    scales = weight.scales[bits]
    assert isinstance(scales, AffineScales)
    for group, columns in enumerate((slice(0, 32), slice(32, 64), slice(64, 70))):
        low, high = w[:, columns].amin(1), w[:, columns].amax(1)
        half = ((high - low) / (2**bits - 1) / 2).half()
        assert torch.equal(scales.scale[-1, :, group], half), f"seed {seed}"
        assert torch.equal(scales.offset[:, group], ((high + low) / 2).half()), f"seed {seed}"
    expected = textbook(w.numpy(), bits, scales.scale[-1].numpy(), scales.offset.numpy(), 32)
    step = 2 * scales.scale[-1].float().amax()
    difference = (decode(weight, bits, torch.float64) - torch.from_numpy(expected)).abs()
    # a weight within fp32 rounding of the middle between two levels may go either way
    assert int((difference > 1e-9).sum()) <= 2, f"seed {seed}"
    assert float(difference.max()) <= float(step) * 1.001, f"seed {seed}"


@given(seeds, st.integers(1, 8), st.integers(1, 50), st.integers(1, 40))
def test_no_weight_is_further_than_half_a_step_away(seed: int, bits: int, columns: int, group_size: int) -> None:
    w = draw(seed, 3, columns)
    weight = RTN().solve_layer(w, (bits,), group_size)
    scales = weight.scales[bits]
    assert isinstance(scales, AffineScales)
    group = torch.arange(columns) // group_size
    half, middle = scales.scale[-1].float()[:, group], scales.offset.float()[:, group]
    # at the ends of the grid, what rounding the half-step and the middle to fp16 has moved them by
    ends = 2**-10 * (middle.abs() + half * 2**bits) + 1e-6
    excess = ((decode(weight, bits) - w).abs() - half - ends).max()
    assert excess <= 0, f"{excess} beyond half a step (seed {seed})"


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_weight_on_the_grid_is_exact(bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    level = torch.randint(0, 2**bits, (5, 32), generator=generator)
    level[:, 0], level[:, 1] = 0, 2**bits - 1
    w = level * 0.125 - 3
    weight = RTN().solve_layer(w, (bits,), 32)
    assert torch.equal(codes(weight, bits), level), f"seed {seed}"
    assert torch.equal(decode(weight, bits), w), f"seed {seed}"


@given(seeds, st.integers(2, 8), st.integers(1, 40))
def test_lower_bits_read_a_prefix_of_the_higher_ones(seed: int, top: int, columns: int) -> None:
    w = draw(seed, 3, columns)
    nested = RTN().solve_layer(w, tuple(range(1, top + 1)), 16)
    alone = RTN().solve_layer(w, (top,), 16)
    for name, tensor in alone.tensors().items():
        assert torch.equal(tensor, nested.tensors()[name]), f"{name} (seed {seed})"
    highest, finest = nested.scales[top], codes(nested, top)
    assert isinstance(highest, AffineScales)
    group = torch.arange(columns) // 16
    step = 2 * highest.scale[-1].double()[:, group]
    lowest = highest.offset.double()[:, group] - step * (2**top - 1) / 2
    for bits in range(1, top):
        dropped = top - bits
        assert torch.equal(codes(nested, bits), finest >> dropped), f"seed {seed}"
        # the mean of all levels of the highest bits that begin with these bits
        mean = lowest + step * ((finest >> dropped << dropped) + (2**dropped - 1) / 2)
        torch.testing.assert_close(decode(nested, bits, torch.float64), mean, rtol=1e-12, atol=1e-12)


def test_the_short_last_group_sees_its_own_columns_only(seed: int) -> None:
    w = draw(seed, 4, 37)
    w[:, 32:] = 5 + torch.rand(4, 5, generator=torch.Generator().manual_seed(seed))
    weight = RTN().solve_layer(w, (4,), 32)
    error = (decode(weight, 4) - w)[:, 32:].abs().max()
    # a range of 1 at 4 bits has half-steps of 1/30
    assert float(error) < 1 / 30 + 0.005, f"seed {seed}"


@pytest.mark.parametrize("value", [0.0, 0.75, -3.0, 0.1, 1e-6, 65504.0, -65504.0])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_constant_stays_that_constant(value: float, bits: int) -> None:
    weight = RTN().solve_layer(torch.full((2, 40), value), (bits,), 16)
    assert torch.equal(decode(weight, bits), torch.full((2, 40), value).half().float())


@pytest.mark.parametrize("size", [1e-20, 1e-6, 1e4])
def test_very_small_and_very_large_weights_stay_finite(size: float) -> None:
    w = draw(0, 8, 32).clamp(-6, 6) * size
    weight = RTN().solve_layer(w, (1, 2, 4, 8), 16)
    for bits in (1, 2, 4, 8):
        dense = decode(weight, bits)
        assert bool(dense.isfinite().all())
        assert float((dense - w).abs().max()) <= 10 * size
