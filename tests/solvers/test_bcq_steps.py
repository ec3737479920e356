"""The half-steps of binary-coded quantization, each against what it promises (algorithms 2.1-2.6, 3.2)."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitstrata.solvers import bcq
from bitstrata.solvers.bcq import Solution, alternate, assign, combine, expand, fit_scales, greedy, objective, sgn

seeds = st.integers(0, 2**31 - 1)
# fp32 rounding of an objective that is a sum of squares of size `energy`
ROUNDING = 1e-5


def draw_groups(seed: int, rows: int, size: int, kind: str = "normal") -> tuple[Tensor, Tensor]:
    """Weights [rows, size] and a mask whose last columns are padding in every second row."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, size, generator=generator)
    if kind == "heavy":
        w = w / torch.rand(rows, size, generator=generator).clamp_min(0.01)
    elif kind == "ties":
        w = (2 * w).round()
    d = torch.ones(rows, size)
    d[::2, size - size // 4 :] = 0
    return w, d


def draw_signs(seed: int, *shape: int) -> Tensor:
    return sgn(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def alternating(w: Tensor, d: Tensor, count: int, rounds: int, *, asymmetric: bool = True) -> Solution:
    """The alternation from a greedy start."""
    start = greedy(w, d, count, asymmetric=asymmetric)
    return alternate(w, d, start, rounds, asymmetric=asymmetric)


def half_steps(solve: Callable[[], Solution]) -> tuple[list[Tensor], Solution]:
    """The objective before and after every fit inside `solve`, which is after every half-step, and what it returns."""
    seen, fit = [], bcq.fit_scales

    def watched(w: Tensor, d: Tensor, planes: Tensor, *current: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
        found = fit(w, d, planes, *current, **options)
        seen.extend([objective(w, d, planes, *current), objective(w, d, planes, *found)])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bcq, "fit_scales", watched)
        return seen, solve()


def energy(w: Tensor, d: Tensor) -> Tensor:
    return (d * w.square()).sum(1)


def test_the_sign_of_zero_is_plus_one() -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        signs = sgn(torch.tensor([0.0, -0.0, 1e-7, -1e-7, 5.0, -5.0], dtype=dtype))
        assert signs.tolist() == [1, 1, 1, -1, 1, -1]
        assert signs.dtype == dtype


@given(seeds, st.integers(1, 4), st.integers(1, 24), st.booleans(), st.sampled_from(["normal", "heavy", "ties"]))
def test_no_half_step_of_the_alternation_increases_the_objective(
    seed: int, count: int, size: int, asymmetric: bool, kind: str
) -> None:
    w, d = draw_groups(seed, 12, size, kind)
    seen, final = half_steps(lambda: alternating(w, d, count, 6, asymmetric=asymmetric))
    torch.testing.assert_close(seen[0], objective(w, d, *greedy(w, d, count, asymmetric=asymmetric)))
    torch.testing.assert_close(seen[-1], objective(w, d, *final))
    assert len(seen) == 2 + 2 * 6
    for before, after in itertools.pairwise(seen):
        excess = (after - before - ROUNDING * energy(w, d)).max()
        assert excess <= 0, f"a half-step increased the objective by {excess} (seed {seed})"


@given(seeds, st.integers(1, 4), st.integers(1, 24), st.booleans(), st.sampled_from(["normal", "heavy", "ties"]))
def test_no_half_step_of_the_expansion_increases_the_objective(
    seed: int, count: int, size: int, asymmetric: bool, kind: str
) -> None:
    w, d = draw_groups(seed, 12, size, kind)
    lower = alternating(w, d, count, 2, asymmetric=asymmetric)
    seen, upper = half_steps(lambda: expand(w, d, lower, 6, asymmetric=asymmetric))
    assert len(seen) == 2 * 6
    for before, after in itertools.pairwise([objective(w, d, *lower), *seen]):
        excess = (after - before - ROUNDING * energy(w, d)).max()
        assert excess <= 0, f"a half-step increased the objective by {excess} (seed {seed})"
    torch.testing.assert_close(seen[-1], objective(w, d, *upper))


@given(seeds, st.integers(1, 5), st.integers(1, 24))
def test_expansion_keeps_the_planes_it_was_given(seed: int, count: int, size: int) -> None:
    w, d = draw_groups(seed, 8, size)
    lower = alternating(w, d, count, 3)
    before = [part.clone() for part in lower]
    planes, scale, _ = expand(w, d, lower, 4)
    assert planes.shape == (count + 1, 8, size)
    assert torch.equal(planes[:-1], before[0]), f"a frozen plane changed (seed {seed})"
    assert all(torch.equal(part, old) for part, old in zip(lower, before, strict=True)), "the input was changed"
    assert bool((planes.abs() == 1).all())
    assert bool((scale[-1] >= 0).all()), "a negative new scale must be flipped together with its plane"


@given(seeds, st.integers(1, 24), st.booleans())
def test_one_plane_has_a_closed_form(seed: int, size: int, asymmetric: bool) -> None:
    w, d = draw_groups(seed, 8, size)
    planes, scale, offset = greedy(w, d, 1, asymmetric=asymmetric)
    mean = (d * w).sum(1) / d.sum(1)
    torch.testing.assert_close(offset, mean if asymmetric else torch.zeros(8))
    torch.testing.assert_close(scale[0], (d * (w - offset.unsqueeze(1)).abs()).sum(1) / d.sum(1))
    assert torch.equal(planes[0], sgn(w - offset.unsqueeze(1)))


def test_one_symmetric_plane_stays_at_its_closed_form_through_the_alternation(seed: int) -> None:
    w, d = draw_groups(seed, 32, 16)
    planes, scale, offset = alternating(w, d, 1, 20, asymmetric=False)
    torch.testing.assert_close(scale[0], (d * w.abs()).sum(1) / d.sum(1))
    assert torch.equal(planes[0], sgn(w))
    assert torch.equal(offset, torch.zeros(32))


@given(seeds, st.integers(1, 4), st.booleans())
def test_scales_are_recovered_exactly_when_the_codes_are_known(seed: int, count: int, asymmetric: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.tensor(list(itertools.product([1.0, -1.0], repeat=count))).T  # every code once: a regular Gram
    order = torch.randperm(2**count, generator=generator)
    planes = codes[:, order].unsqueeze(1).expand(-1, 5, -1)
    true_scale = torch.rand(count, 5, generator=generator) + 0.1
    true_offset = torch.randn(5, generator=generator) if asymmetric else torch.zeros(5)
    w = combine(planes, true_scale, true_offset)
    start = torch.randn(count, 5, generator=generator), torch.zeros(5)
    scale, offset = fit_scales(w, torch.ones_like(w), planes, *start, asymmetric=asymmetric)
    torch.testing.assert_close(scale, true_scale, atol=1e-5, rtol=1e-5, msg=lambda text: f"seed {seed}: {text}")
    torch.testing.assert_close(offset, true_offset, atol=1e-5, rtol=1e-5, msg=lambda text: f"seed {seed}: {text}")


@given(seeds, st.integers(1, 4))
def test_a_weight_made_of_planes_is_recovered(seed: int, count: int) -> None:
    """w = z + sum a_i B_i with every code equally often and scales whose levels are all distinct."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.tensor(list(itertools.product([1.0, -1.0], repeat=count))).T.repeat(1, 3)
    order = torch.randperm(codes.shape[1], generator=generator)
    planes = codes[:, order].unsqueeze(1).expand(-1, 6, -1)
    shrink = 0.3 + 0.15 * torch.rand(count, 6, generator=generator)  # each scale is above the sum of those after it
    true_scale = 2 * shrink.cumprod(0)
    true_offset = torch.randn(6, generator=generator)
    w = combine(planes, true_scale, true_offset)
    found = alternating(w, torch.ones_like(w), count, 3)
    assert torch.equal(found[0], planes), f"seed {seed}"
    torch.testing.assert_close(found[1], true_scale, atol=1e-5, rtol=1e-4, msg=lambda text: f"seed {seed}: {text}")
    torch.testing.assert_close(found[2], true_offset, atol=1e-5, rtol=1e-4, msg=lambda text: f"seed {seed}: {text}")


@given(seeds, st.integers(1, 4), st.integers(2, 24), st.booleans())
def test_the_last_fit_is_optimal_for_the_codes_returned(seed: int, count: int, size: int, asymmetric: bool) -> None:
    w, d = draw_groups(seed, 8, size)
    solutions = [alternating(w, d, count, 3, asymmetric=asymmetric)]
    solutions.append(expand(w, d, solutions[0], 3, asymmetric=asymmetric))
    for planes, scale, offset in solutions:
        rest = d * (w - combine(planes, scale, offset))
        slope = torch.stack([(rest * plane).sum(1) for plane in planes])
        limit = ROUNDING * (d * w.abs()).sum(1)
        assert bool((slope.abs() <= limit).all()), f"the objective still falls along a scale (seed {seed})"
        if asymmetric:
            assert bool((rest.sum(1).abs() <= limit).all()), f"the objective still falls along the offset (seed {seed})"


@pytest.mark.parametrize("second", ["coincides", "opposite", "constant"])
def test_a_direction_without_data_keeps_its_value(second: str, seed: int) -> None:
    w, d = draw_groups(seed, 16, 12)
    first = draw_signs(seed, 16, 12)
    other = {"coincides": first, "opposite": -first, "constant": torch.ones_like(first)}[second]
    planes = torch.stack([first, other])
    old_scale, old_offset = torch.tensor([[0.7], [0.2]]).expand(2, 16), torch.full((16,), 0.1)
    scale, offset = fit_scales(w, d, planes, old_scale, old_offset)
    assert bool(scale.isfinite().all())
    assert bool(offset.isfinite().all())
    free = {
        "coincides": lambda scale, offset: scale[0] - scale[1],
        "opposite": lambda scale, offset: scale[0] + scale[1],
        "constant": lambda scale, offset: scale[1] - offset,
    }[second]
    torch.testing.assert_close(free(scale, offset), free(old_scale, old_offset), atol=1e-5, rtol=1e-5)
    # and the direction with data is solved as if the useless column were not there
    alone = fit_scales(w, d, planes[:1], old_scale[:1], old_offset)
    together, apart = d * combine(planes, scale, offset), d * combine(planes[:1], *alone)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


def test_planes_that_only_together_are_dependent_do_not_blow_up(seed: int) -> None:
    """Over three classes of columns B_0 + B_1 + B_2 = 1, the offset's column; no two columns are alike."""
    classes = torch.arange(126) % 3
    patterns = torch.tensor([[1.0, 1, -1], [1, -1, 1], [-1, 1, 1]])
    planes = patterns[:, classes].unsqueeze(1).expand(3, 32, 126).contiguous()
    w, d = 3 * torch.randn(32, 126, generator=torch.Generator().manual_seed(seed)), torch.ones(32, 126)
    scale, offset = fit_scales(w, d, planes, torch.zeros(3, 32), torch.zeros(32))
    assert float(scale.abs().max()) < 10, f"scales of {scale.abs().max()} for weights of 3 (seed {seed})"
    torch.testing.assert_close(scale.sum(0), offset, atol=1e-4, rtol=0)  # nothing moved along (1, 1, 1, -1)


def test_a_weight_on_a_midpoint_goes_up() -> None:
    scale, offset = torch.tensor([[2.0], [1.0]]), torch.tensor([0.5])  # levels -2.5, -0.5, 1.5, 3.5
    w = torch.tensor([[-9.0, -1.5, 0.5, 2.5, 9.0]])
    planes = assign(w, scale, offset)
    assert combine(planes, scale, offset).tolist() == [[-2.5, -0.5, 1.5, 3.5, 3.5]]
    assert torch.equal(assign(torch.zeros(1, 3), torch.ones(1, 1), torch.zeros(1)), torch.ones(1, 1, 3))


@given(seeds, st.integers(1, 5), st.integers(1, 24))
def test_assignment_takes_the_nearest_level(seed: int, count: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(6, size, generator=generator)
    scale, offset = torch.rand(count, 6, generator=generator), torch.randn(6, generator=generator)
    signs = torch.tensor(list(itertools.product([1.0, -1.0], repeat=count))).T  # [count, 2^count]
    levels = offset.unsqueeze(1) + scale.T @ signs
    nearest = (w.unsqueeze(2) - levels.unsqueeze(1)).abs().amin(2)
    found = (w - combine(assign(w, scale, offset), scale, offset)).abs()
    torch.testing.assert_close(found, nearest, atol=1e-5, rtol=1e-5, msg=lambda text: f"seed {seed}: {text}")


@given(seeds, st.integers(1, 3), st.integers(4, 24), st.booleans())
def test_what_stands_in_padding_columns_changes_nothing(seed: int, count: int, size: int, asymmetric: bool) -> None:
    w, d = draw_groups(seed, 8, size)
    noisy = torch.where(d > 0, w, 1000 * draw_groups(seed + 1, 8, size)[0])
    one, other = (alternating(x, d, count, 4, asymmetric=asymmetric) for x in (w, noisy))
    grown = expand(w, d, one, 4, asymmetric=asymmetric)
    grown_other = expand(noisy, d, other, 4, asymmetric=asymmetric)
    for left, right in ((one, other), (grown, grown_other)):
        assert torch.equal(left[1], right[1]), f"scales depend on padding (seed {seed})"
        assert torch.equal(left[2], right[2]), f"offsets depend on padding (seed {seed})"
        assert torch.equal(left[0] * d, right[0] * d), f"codes depend on padding (seed {seed})"


@pytest.mark.parametrize("exponent", [-66, -20, 13])  # about 1e-20, 1e-6 and 1e4
def test_the_solution_scales_with_the_weights(exponent: int, seed: int) -> None:
    """A power of two changes no rounding, so nothing in the solver may depend on the size of the weights."""
    w, d = draw_groups(seed, 32, 24)
    small = alternating(w * 2.0**exponent, d, 2, 8)
    plain = alternating(w, d, 2, 8)
    for left, right in ((small, plain), (expand(w * 2.0**exponent, d, small, 8), expand(w, d, plain, 8))):
        assert torch.equal(left[0], right[0]), f"seed {seed}"
        assert torch.equal(left[1], right[1] * 2.0**exponent), f"seed {seed}"
        assert torch.equal(left[2], right[2] * 2.0**exponent), f"seed {seed}"
