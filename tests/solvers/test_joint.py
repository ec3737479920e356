"""The joint solver against what its algebra promises, and against the published forms written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from moments_helpers import correlated, loss, moments_of, rows_of, solver_of

from bitstrata.kernels.cpu import choose_codes, missing
from bitstrata.planes import decode
from bitstrata.solvers import joint
from bitstrata.solvers.bpdq import highest_bits
from bitstrata.solvers.grouping import code_signs
from bitstrata.solvers.joint import (
    RIDGE,
    column_codes,
    column_order,
    first_grid,
    least_squares_step,
    levels,
    refitted,
    rounded,
)
from bitstrata.solvers.metric import upper_factor

N, K, G = 13, 72, 16
GROUPS = [16, 16, 16, 16, 8]
CPU = torch.device("cpu")


@pytest.fixture
def problem(seed):
    weight, moments = rows_of(N, K, seed), moments_of(correlated(K, seed))
    return weight, moments.damped(0.01)


def test_codes_are_numbers_with_the_first_plane_highest():
    assert code_signs(2, CPU).T.tolist() == [[-1, -1], [-1, 1], [1, -1], [1, 1]]
    table = levels(torch.tensor([[4.0], [2.0], [1.0], [0.5]]))
    assert table[:, 0].tolist() == [-6.5, -4.5, -2.5, -0.5, 1.5, 3.5, 5.5, 7.5]


def test_upper_factor(problem):
    _, hessian = problem
    factor = upper_factor(hessian).double()
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ hessian.double(), torch.eye(K).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [(2,), (3,), (2, 3, 4), (1, 4), (2, 5, 8)], ids=str)
def test_passed_on_errors_add_up_to_the_loss(problem, bits):
    """sum over groups of |E|^2 = (w - q) H (w - q)^T: the strongest single check of a compensated pass."""
    weight, hessian = problem
    solver = solver_of(weight, hessian, bits, GROUPS)
    for track, told in zip(solver.tracks, solver.compensate(3), strict=True):
        true = loss(weight, solver.decoded(track).T, hessian)
        torch.testing.assert_close(told.double(), true, rtol=1e-3, atol=0)


def published_group(target, factor, bits, rounds):
    """One group of BPDQ as published: errors of the old values corrected for the refit. float64, W [N, g]."""
    tables = highest_bits(target.T.float(), bits, metric_of(factor).float())
    inverse = torch.linalg.inv(factor)
    best, best_score = None, None
    for _ in range(rounds):
        values = levels(tables.float()).double()  # [2^p, N]
        left, code, old = target.clone(), [], []
        errors = torch.empty_like(target)
        for column in range(target.shape[1]):
            chosen = (left[:, column] - values).abs().argmin(0)
            value = values.gather(0, chosen.unsqueeze(0))[0]
            errors[:, column] = (left[:, column] - value) / factor[column, column]
            left[:, column:] -= errors[:, column : column + 1] * factor[column, column:]
            code.append(chosen)
            old.append(value)
        code, old = torch.stack(code), torch.stack(old, 1)
        tables = rounded(refitted(target.T.float(), code, tables.float(), metric_of(factor).float()))
        new = levels(tables).gather(0, code).double().T
        errors = errors + (old - new) @ inverse  # the delta correction
        score = errors.square().sum(1)
        if best is None:
            best, best_score = (code, errors), score
        else:
            better = score < best_score
            best = torch.where(better, code, best[0]), torch.where(better.unsqueeze(1), errors, best[1])
            best_score = torch.where(better, score, best_score)
    return best


def metric_of(factor):
    inverse = torch.linalg.inv(factor)
    return inverse @ inverse.T


@pytest.mark.parametrize("bits", [2, 3])
def test_one_track_is_bpdq_with_its_delta_correction(problem, bits, seed):
    weight, hessian = problem
    factor = upper_factor(hessian)[:G, :G].double()
    code, errors = published_group(weight[:, :G].double(), factor, bits, 4)
    solver = solver_of(weight, hessian, (bits,), GROUPS, start=highest_bits)
    (found,) = solver._compensate_group(0, [weight[:, :G].T.contiguous()], [factor.float()], 4)
    same = (solver.code[:G] == code).all(0)
    assert same.sum() >= N - 2  # a tie may fall the other way in float32
    torch.testing.assert_close(found[:, same].double(), errors.T[:, same], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [(2, 3, 4), (3,), (1, 2, 8)], ids=str)
def test_polish_never_raises_the_weighted_loss_of_a_row(problem, bits):
    weight, hessian = problem
    solver = solver_of(weight, hessian, bits, GROUPS)
    solver.compensate(2)
    before = sum(t.weight * loss(weight, solver.decoded(t).T, hessian) for t in solver.tracks)
    for _ in range(3):
        solver.polish(1)
        after = sum(t.weight * loss(weight, solver.decoded(t).T, hessian) for t in solver.tracks)
        assert (after <= before * (1 + 1e-5)).all()
        before = after


def test_polish_finds_what_is_left_to_gain(problem):
    weight, hessian = problem
    solver = solver_of(weight, hessian, (2, 3, 4), GROUPS)
    before = sum(t.weight * x.sum() for t, x in zip(solver.tracks, solver.compensate(4), strict=True))
    solver.polish(2)
    after = sum(t.weight * t.loss(solver.decoded(t)).sum() for t in solver.tracks)
    assert after < 0.97 * before


def test_polish_refits_coefficients_alone(problem, monkeypatch):
    """With the codes held fast it undoes what was done to the coefficients."""
    weight, hessian = problem
    solver = solver_of(weight, hessian, (2, 3, 4), GROUPS)
    best = [told.sum() for told in solver.compensate(4)]
    for track in solver.tracks:
        track.coefficients *= 1.3
    monkeypatch.setattr(solver, "_polish_codes", lambda group, residual, metrics: None)
    solver.polish(8)
    for track, before in zip(solver.tracks, best, strict=True):
        assert track.loss(solver.decoded(track)).sum() < 1.05 * before


def test_coefficients_are_stored_exactly_and_columns_come_back_in_order(problem):
    weight, hessian = problem
    groups = column_order(hessian.diagonal(), G)
    order = torch.cat(groups)
    assert sorted(order.tolist()) == list(range(K))
    assert {tuple(sorted(group.tolist())) for group in groups} == {
        tuple(range(start, min(start + G, K))) for start in range(0, K, G)
    }
    solver = solver_of(weight[:, order], hessian[order][:, order], (2, 4), [len(group) for group in groups])
    solver.compensate(2)
    solver.polish(1)
    stored = solver.plane_weight(groups, G)
    for track in solver.tracks:
        decoded = torch.empty(N, K)
        decoded[:, order] = solver.decoded(track).T
        torch.testing.assert_close(decode(stored, track.bits, torch.float32), decoded, rtol=1e-6, atol=1e-7)


def test_the_best_round_is_kept_for_each_row(problem):
    weight, hessian = problem
    losses = []
    for rounds in range(1, 7):
        solver = solver_of(weight, hessian, (2, 3), [K])  # one group: nothing else changes with the rounds
        told = solver.compensate(rounds)
        losses.append(sum(t.weight * x for t, x in zip(solver.tracks, told, strict=True)))
    for fewer, more in itertools.pairwise(losses):
        assert (more <= fewer).all()


def test_secure_makes_every_row_monotone(problem, seed):
    weight, hessian = problem
    solver = solver_of(weight, hessian, (2, 3, 4), GROUPS)
    solver.compensate(2)
    assert solver.secure() == 0
    damaged = torch.rand(N, generator=torch.Generator().manual_seed(seed)) < 0.5
    damaged[0] = True
    solver.tracks[1].coefficients[:, :, damaged] *= 5
    assert solver.secure() >= damaged.sum()
    found = [loss(weight, solver.decoded(track).T, hessian) for track in solver.tracks]
    assert (found[1] <= found[0] * (1 + 1e-6)).all()
    assert (found[2] <= found[1] * (1 + 1e-6)).all()
    torch.testing.assert_close(found[1][damaged], found[0][damaged])


def test_the_lowest_bits_do_not_depend_on_what_is_not_asked_of_them(problem):
    """With all weight on the lowest track the joint code's prefix is that of the track alone."""
    weight, hessian = problem
    alone, joint = (solver_of(weight, hessian, bits, GROUPS, growth=1e-9) for bits in ((2,), (2, 4)))
    one, two = alone.compensate(3)[0], joint.compensate(3)[0]
    torch.testing.assert_close(one, two, rtol=0.05, atol=0)


def test_small_systems(seed):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(20, 6, 30, generator=generator).double()
    normal = basis.transpose(1, 2) @ basis  # 30 > 6: singular but for the ridge
    normal = normal[:, :6, :6] + torch.eye(6).double()
    right = torch.randn(20, 6, generator=generator).double()
    expected = torch.linalg.solve(normal, right)
    found = joint.solve_small(normal.permute(1, 2, 0).clone(), right.T.clone())
    torch.testing.assert_close(found.T, expected, rtol=1e-8, atol=1e-10)


def hard_rows(kind):
    weight = rows_of(8, K, 5)
    if kind == "zeros":
        weight[:] = 0
    if kind == "constant":
        weight[:] = 0.25
    if kind == "outlier":
        weight[:, 3] = 1000.0
    if kind == "tiny":
        weight *= 1e-5
    if kind == "two values":
        weight = weight.sign()
    return weight


@pytest.mark.parametrize("kind", ["zeros", "constant", "outlier", "tiny", "two values"])
@pytest.mark.parametrize("bits", [(1,), (2, 3, 4), (2, 8)], ids=str)
def test_hard_rows(kind, bits, seed):
    weight, hessian = hard_rows(kind), moments_of(correlated(K, seed)).damped(0.01)
    solver = solver_of(weight, hessian, bits, GROUPS)
    solver.compensate(3)
    solver.polish(2)
    solver.secure()
    for track in solver.tracks:
        decoded = solver.decoded(track).T
        assert decoded.isfinite().all()
        if kind == "zeros":
            assert (decoded.abs() < 1e-6).all()
        if kind == "constant":
            torch.testing.assert_close(decoded, weight, rtol=2e-3, atol=0)
        if kind == "two values" and track.bits > 1:
            assert loss(weight, decoded, hessian).sum() < 1e-3 * loss(weight, 0 * weight, hessian).sum()


def test_first_grid_of_uniform_weights_is_exact():
    y = torch.arange(16.0).unsqueeze(1).repeat(1, 3)
    table = levels(first_grid(y, 4, torch.eye(16)))
    torch.testing.assert_close(table, y)


NATIVE = pytest.param(True, marks=pytest.mark.skipif(bool(missing), reason="the native kernels are not built"))


def without_native_code(patch):
    patch.setattr(joint, "choose_codes", lambda *arguments, **options: False)
    patch.setattr(joint, "fit_codes", lambda *arguments: None)


@pytest.mark.parametrize("native", [NATIVE, False], ids=["native", "torch"])
@pytest.mark.parametrize("given", [False, True], ids=["compensated", "polish"])
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("bits", [(1,), (3,), (2, 3, 4), (2, 5, 8)], ids=str)
def test_the_column_loop_takes_the_best_code_of_every_column(bits, rows, given, native, seed, monkeypatch):
    """Replayed in float64 with the codes it chose: none is worse than the best one but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    columns, top = 19, max(bits)
    tables = [torch.randn(2**value, rows, generator=generator) for value in bits]
    left = [torch.randn(columns, rows, generator=generator) for _ in bits]
    factors = [0.2 * torch.randn(columns, columns, generator=generator) + torch.eye(columns) for _ in bits]
    scales = [torch.rand(columns, generator=generator) + 0.1 for _ in bits]
    before = torch.randint(2**top, (columns, rows), generator=generator)
    codes = before.clone() if given else torch.full((columns, rows), -(2**62))
    if native:
        assert choose_codes(list(bits), tables, left, factors, scales, codes, given=given)
    else:
        without_native_code(monkeypatch)
        column_codes(bits, tables, left, factors, scales, codes, given=given)
    assert codes.min() >= 0
    assert codes.max() < 2**top
    remaining = [y.double() for y in left]
    every = torch.arange(2**top)
    for column in range(columns):
        cost = torch.zeros(2**top, rows, dtype=torch.float64)
        wanted = []
        for value, table, y, factor, scale in zip(bits, tables, remaining, factors, scales, strict=True):
            target = y[column]
            if given:
                old = table.double().gather(0, before[column : column + 1] >> (top - value))[0]
                target = old + target / factor[column, column].double()
            wanted.append(target)
            cost += scale[column].double() * (target - table.double()[every >> (top - value)]).square()
        chosen = cost.gather(0, codes[column : column + 1])[0]
        assert (chosen <= cost.min(0).values * (1 + 1e-4) + 1e-4).all()
        for value, table, y, factor, target in zip(bits, tables, remaining, factors, wanted, strict=True):
            new = table.double().gather(0, codes[column : column + 1] >> (top - value))[0]
            moved = target - new
            if given:
                moved = new - table.double().gather(0, before[column : column + 1] >> (top - value))[0]
            y[column + 1 :] -= factor.double()[column, column + 1 :, None] * moved


@pytest.mark.parametrize("given", [False, True], ids=["compensated", "polish"])
def test_columns_have_levels_of_their_own(given, seed):
    """Sets that are shifted: the same codes as with one set and targets that are shifted back."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(8, 37, generator=generator)
    shift, which = torch.tensor([0.0, 16.0, -32.0]), [0, 2, 1, 1, 2, 0, 1]
    y = torch.randn(7, 37, generator=generator)
    factor = torch.eye(7) if given else 0.1 * torch.randn(7, 7, generator=generator) + torch.eye(7)
    codes, expected = torch.zeros(7, 37, dtype=torch.int64), torch.zeros(7, 37, dtype=torch.int64)
    left = y if given else y + shift[which].unsqueeze(1)
    sets, ones = table + shift[:, None, None], torch.ones(7)
    column_codes((3,), [sets], [left], [factor], [ones], codes, given=given, which=which)
    column_codes((3,), [table], [y], [factor], [ones], expected, given=given)
    assert (codes == expected).double().mean() > 0.97  # a shift rounds; a tie that falls the other way moves the rest
    assert expected.unique().numel() > 4


@pytest.mark.skipif(bool(missing), reason="the native kernels are not built")
@pytest.mark.parametrize("bits", [(3,), (2, 3, 4), (2, 5, 8)], ids=str)
def test_both_column_loops_find_solutions_of_the_same_loss(bits, seed, monkeypatch):
    weight, hessian = rows_of(70, K, seed), moments_of(correlated(K, seed)).damped(0.01)
    found = {}
    for native in (True, False):
        if not native:
            without_native_code(monkeypatch)
        solver = solver_of(weight, hessian, bits, GROUPS)
        solver.compensate(1)
        solver.polish(1)
        found[native] = [track.loss(solver.decoded(track)).sum() for track in solver.tracks]
    torch.testing.assert_close(found[True], found[False], rtol=0.2, atol=1e-6)


@pytest.mark.parametrize("native", [NATIVE, False], ids=["native", "torch"])
@pytest.mark.parametrize("columns", [1, 7, 8, 17, 128])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 70])
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_the_step_is_that_of_least_squares(bits, rows, columns, native, seed, monkeypatch):
    """Against float64: what is left of the normal equations, beside what stands there."""
    generator = torch.Generator().manual_seed(seed)
    code = torch.randint(2**bits, (columns, rows), generator=generator)
    mix = torch.randn(columns, columns, generator=generator)
    metric = mix @ mix.T / columns + 0.1 * torch.eye(columns)
    residual = metric @ torch.randn(columns, rows, generator=generator)
    if not native:
        without_native_code(monkeypatch)
    step = least_squares_step(code, bits, metric, residual)
    assert step.shape == (bits + 1, rows)
    signs = code_signs(bits, CPU).T.double()[code]  # [g, N, p]
    basis = torch.cat([signs, torch.ones(columns, rows, 1, dtype=torch.float64)], 2).permute(1, 2, 0)  # [N, p + 1, g]
    normal = basis @ metric.double() @ basis.mT
    normal += RIDGE * normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(bits + 1)
    right = (basis @ residual.T.double().unsqueeze(2))[..., 0]
    left = (normal @ step.T.double().unsqueeze(2))[..., 0] - right
    size = normal.norm(dim=(1, 2)) * step.double().norm(dim=0) + right.norm(dim=1)
    assert (left.norm(dim=1) <= 1e-5 * size).all()


@pytest.mark.skipif(bool(missing), reason="the native kernels are not built")
def test_native_steps_are_the_same_for_any_number_of_threads(seed):
    generator = torch.Generator().manual_seed(seed)
    code = torch.randint(16, (64, 99), generator=generator)
    metric, residual = torch.eye(64) + 0.1, torch.randn(64, 99, generator=generator)
    before = torch.get_num_threads()
    try:
        steps = [
            least_squares_step(code, 4, metric, residual) for count in (1, 2, 5) if not torch.set_num_threads(count)
        ]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(steps[0], step) for step in steps[1:])


def test_the_native_loop_checks_what_it_is_given():
    y, codes = torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.int64)
    good = [torch.zeros(4, 3), y, torch.eye(4), torch.ones(4)]
    for index, bad in enumerate((torch.zeros(8, 3), torch.zeros(3, 3), torch.eye(3), torch.ones(4).double())):
        wrong = [bad if place == index else tensor for place, tensor in enumerate(good)]
        with pytest.raises(AssertionError):
            choose_codes([2], *([tensor] for tensor in wrong), codes, given=False)
    if not missing:
        for bits in ([3, 2], [9]):
            tables = [torch.zeros(2**b, 3) for b in bits]
            more = [[tensor] * len(bits) for tensor in good[1:]]
            with pytest.raises((ValueError, IndexError), match="bits must"):
                choose_codes(bits, tables, *more, codes, given=False)
