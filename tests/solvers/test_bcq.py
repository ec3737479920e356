"""BCQ on whole weights: what is stored means what was solved, and hard weights come out finite."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitstrata.planes import AffineScales, PlaneWeight, decode, signs
from bitstrata.planes.weights import scales_tensors
from bitstrata.solvers import bcq
from bitstrata.solvers.bcq import BCQ, base, combine, grow, objective, with_fallback
from bitstrata.solvers.grouping import Grouping, affine_weight, row_chunks, to_scale

seeds = st.integers(0, 2**31 - 1)
FAST = BCQ(rounds=4)


def draw(seed: int, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def error(weight: PlaneWeight, bits: int, w: Tensor) -> float:
    """||W - W_bits||^2 / ||W||^2."""
    return float((decode(weight, bits, torch.float64) - w).square().sum() / w.double().square().sum())


def assert_finite(weight: PlaneWeight) -> None:
    for bits in weight.bits:
        scales = weight.scales[bits]
        assert isinstance(scales, AffineScales)
        assert bool(scales.scale.isfinite().all()), f"a scale at {bits} bits is not finite"
        assert bool(scales.offset.isfinite().all()), f"an offset at {bits} bits is not finite"
        assert bool(decode(weight, bits).isfinite().all())


@given(seeds, st.integers(1, 70), st.integers(1, 40), st.sampled_from([(2,), (1, 2, 3), (2, 4)]))
def test_what_is_stored_decodes_to_what_was_solved_bit_for_bit(
    seed: int, columns: int, group_size: int, bits: tuple[int, ...]
) -> None:
    w = draw(seed, 5, columns)
    grouping = Grouping(5, columns, group_size)
    grouped, mask = grouping.split(w), grouping.mask(w.device)
    solution = base(grouped, mask, bits[0], 3)
    coefficients = {bits[0]: solution[1:]}
    for count in range(bits[0] + 1, bits[-1] + 1):
        solution = grow(grouped, mask, solution, 3)
        if count in bits:
            coefficients[count] = solution[1:]
    planes = solution[0]
    with_fallback(grouped, mask, planes, coefficients)
    stored = affine_weight(grouping, planes > 0, coefficients)
    for value in bits:
        scale, offset = coefficients[value]
        assert torch.equal(scale, to_scale(scale).float()), "the fallback must leave coefficients as they are stored"
        unpacked = grouping.join(combine(planes[:value], scale, offset))
        assert torch.equal(decode(stored, value), unpacked), f"{value} bits of {columns} columns (seed {seed})"
    whole = BCQ(rounds=3).solve_layer(w, bits, group_size)
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, stored.tensors()[name]), f"{name} (seed {seed})"


@given(seeds, st.integers(1, 40), st.integers(1, 24), st.sampled_from([1.0, 1e-6, 1e-7, 1e4]))
def test_the_error_of_every_group_falls_with_bits_after_rounding(
    seed: int, columns: int, group_size: int, size: float
) -> None:
    w = draw(seed, 4, columns) * size
    stored = FAST.solve_layer(w, (1, 2, 3, 4), group_size)
    grouping = Grouping(4, columns, group_size)
    errors = [grouping.split((decode(stored, bits) - w).square()).sum(1) for bits in (1, 2, 3, 4)]
    for bits, (lower, higher) in enumerate(itertools.pairwise(errors), 1):
        # summed in another order here than in the solver
        excess = (higher - lower * (1 + 1e-5)).max()
        assert excess <= 0, f"{bits + 1} bits are worse than {bits} by {excess} (seed {seed})"


def test_the_fallback_takes_over_the_lower_bits_where_rounding_hurts() -> None:
    """Group 0 gets a third plane that makes it worse, group 1 one that makes it better."""
    planes = torch.tensor([[[1.0, 1, -1, -1]] * 2, [[1.0, -1, 1, -1]] * 2, [[1.0, -1, -1, 1]] * 2])  # [3, 2, 4]
    w = combine(planes, torch.tensor([[1.0, 1.0], [0.5, 0.5], [0.0, 0.25]]), torch.zeros(2))
    two = torch.tensor([[1.0, 1.0], [0.5, 0.5]]), torch.zeros(2)
    three = torch.tensor([[1.0, 1.0], [0.5, 0.5], [0.25, 0.25]]), torch.tensor([0.125, 0.0])
    coefficients = {2: two, 3: three}
    with_fallback(w, torch.ones_like(w), planes, coefficients)
    scale, offset = coefficients[3]
    assert scale[:, 0].tolist() == [1.0, 0.5, 0.0], "the group that became worse takes the scales of 2 bits"
    assert scale[:, 1].tolist() == [1.0, 0.5, 0.25], "the group that became better keeps its own"
    assert offset.tolist() == [0.0, 0.0]
    lower, upper = combine(planes[:2], *coefficients[2]), combine(planes, scale, offset)
    assert torch.equal(upper[0], lower[0])
    assert torch.equal(upper[1], w[1])


def test_the_fallback_is_reached_by_real_weights() -> None:
    """Scales of weights near the smallest fp16 are rounded to a coarse grid, so a plane more can hurt."""
    w = draw(0, 256, 16) * 3e-7
    ones = torch.ones_like(w)
    lower = base(w, ones, 3, 4)
    planes, scale, offset = grow(w, ones, lower, 4)
    rounded = objective(w, ones, planes, to_scale(scale).float(), to_scale(offset).float())
    before = objective(w, ones, planes[:3], *(to_scale(part).float() for part in lower[1:]))
    hurt = rounded > before
    assert 0 < int(hurt.sum()) < 256
    stored = FAST.solve_layer(w, (3, 4), 16)
    three, four = (scales_tensors(stored.scales[bits], bits) for bits in (3, 4))
    taken_over = (four["scale_4"][:3] == three["scale_3"]).all(0) & (four["scale_4"][3] == 0)
    assert torch.equal(taken_over[:, 0] & hurt, hurt)
    assert torch.equal(decode(stored, 4)[hurt], decode(stored, 3)[hurt])


def test_bits_above_never_change_the_planes_and_scales_below(seed: int) -> None:
    w = draw(seed, 12, 70)
    alone, pair, many = (FAST.solve_layer(w, bits, 32).tensors() for bits in ((2,), (2, 3), (2, 3, 4)))
    for smaller, larger in ((alone, pair), (pair, many)):
        assert smaller.keys() < larger.keys()
        for name, tensor in smaller.items():
            assert torch.equal(tensor, larger[name]), f"{name} changed when a plane was added (seed {seed})"


def test_zeros_stay_zeros() -> None:
    stored = BCQ().solve_layer(torch.zeros(3, 40), (2, 3, 4), 16)
    assert_finite(stored)
    for bits in (2, 3, 4):
        assert torch.equal(decode(stored, bits), torch.zeros(3, 40))


@pytest.mark.parametrize("value", [0.75, -3.0, 0.1, 1e-6, 60000.0])
def test_a_constant_stays_that_constant(value: float) -> None:
    stored = BCQ().solve_layer(torch.full((2, 40), value), (1, 2, 3, 4), 16)
    assert_finite(stored)
    for bits in (1, 2, 3, 4):
        torch.testing.assert_close(decode(stored, bits), torch.full((2, 40), value), rtol=2**-11, atol=2**-25)


@pytest.mark.parametrize("value", [7.0, -0.5, 1e-3, 6e4])
def test_one_outlier_among_zeros_is_exact(value: float) -> None:
    w = torch.zeros(16, 16)
    w.fill_diagonal_(value)
    stored = BCQ().solve_layer(w, (1, 2, 3, 4), 16)
    assert_finite(stored)
    for bits in (1, 2, 3, 4):
        assert error(stored, bits, w) < 2**-20, f"at {bits} bits"  # two levels suffice; scales are fp16


def test_rows_of_zeros_beside_others_stay_zeros(seed: int) -> None:
    w = draw(seed, 6, 48)
    w[[0, 3]] = 0
    stored = FAST.solve_layer(w, (2, 3), 32)
    assert_finite(stored)
    for bits in (2, 3):
        dense = decode(stored, bits)
        assert torch.equal(dense[[0, 3]], torch.zeros(2, 48)), f"seed {seed}"
        assert float((dense - w).square().sum() / w.square().sum()) < 0.2, f"seed {seed}"


@pytest.mark.parametrize(
    ("size", "slack"),
    [
        (1e4, 1e-5),  # fp16 scales are as good as at size 1
        (1e-6, 2e-2),  # scales are multiples of 6e-8, the smallest fp16
    ],
)
def test_the_size_of_the_weights_hardly_matters(size: float, slack: float) -> None:
    w = draw(0, 16, 64).clamp(-4, 4)
    plain = FAST.solve_layer(w, (2, 3, 4), 32)
    scaled = FAST.solve_layer(w * size, (2, 3, 4), 32)
    assert_finite(scaled)
    for bits in (2, 3, 4):
        assert error(scaled, bits, w * size) <= error(plain, bits, w) + slack, f"at {bits} bits"


def test_weights_below_every_fp16_number_become_zero() -> None:
    stored = BCQ().solve_layer(draw(0, 4, 32) * 1e-20, (2, 3), 16)
    assert_finite(stored)
    assert torch.equal(decode(stored, 3), torch.zeros(4, 32))


def test_coefficients_beyond_fp16_are_clamped_not_infinite() -> None:
    assert to_scale(torch.tensor([1e9, -1e9, 1.0])).tolist() == [65504.0, -65504.0, 1.0]
    w = 65504 * torch.sign(draw(0, 4, 16))
    assert_finite(BCQ().solve_layer(w, (1, 2, 3, 4), 16))


def test_a_short_last_group_is_fitted_to_its_own_columns(seed: int) -> None:
    """Columns 32..34 all have 5 in them; zeros of the padding would pull them down."""
    w = draw(seed, 4, 35)
    w[:, 32:] = 5
    stored = FAST.solve_layer(w, (1, 2, 3), 32)
    for bits in (1, 2, 3):
        assert torch.equal(decode(stored, bits)[:, 32:], torch.full((4, 3), 5.0)), f"{bits} bits, seed {seed}"


@given(st.integers(0, 2000), st.integers(1, 300), st.integers(1, 5000))
def test_chunks_cover_all_rows_once_within_the_budget(rows: int, per_row: int, budget: int) -> None:
    chunks = row_chunks(rows, per_row, budget)
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(rows))
    assert all((chunk.stop - chunk.start) * per_row <= max(budget, per_row) for chunk in chunks)


def test_solving_in_chunks_gives_what_solving_at_once_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    w = draw(0, 40, 48)
    whole = FAST.solve_layer(w, (2, 3), 16)
    calls = []

    def tiny(rows: int, per_row: int) -> list[slice]:
        calls.append(rows)
        return [slice(start, min(start + 7, rows)) for start in range(0, rows, 7)]

    monkeypatch.setattr(bcq, "row_chunks", tiny)
    chunked = FAST.solve_layer(w, (2, 3), 16)
    assert calls == [120, 120]
    for bits in (2, 3):
        torch.testing.assert_close(decode(chunked, bits), decode(whole, bits), rtol=1e-3, atol=1e-3)


def test_planes_are_stored_with_the_sign_of_zero_up() -> None:
    """Residuals that are exactly 0 get the code +1 in memory and on disk alike."""
    w = torch.tensor([[1.0, -1, 1, -1, 0, 0, 1, -1]])
    stored = BCQ(rounds=1, asymmetric=False).solve_layer(w, (1, 2), 8)
    assert signs(stored, 0).tolist() == [[1, -1, 1, -1, 1, 1, 1, -1]]
