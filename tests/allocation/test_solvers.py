"""Solvers against trying everything; exact limits; bounds and fused groups."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
from problems import all_allocations, random_problem

from bitstrata.allocation import (
    SENSITIVITY_FILE,
    SOLVERS,
    Bounds,
    Problem,
    Sensitivity,
    greedy,
    milp,
    paired,
    random_allocation,
    waterfill,
)
from bitstrata.allocation.problem import fused_units
from bitstrata.checkpoint import CheckpointReader
from bitstrata.errors import UsageError
from bitstrata.plans import ModelSizes

SEEDS = range(12)
SHARES = (0.0, 0.1, 0.37, 0.8, 1.0)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("seed", SEEDS)
def test_milp_is_the_best_sum_there_is(seed, share):
    problem = random_problem(seed, interacting=False, share=share)
    best = min(problem.single[x].sum() for x in all_allocations(problem))
    x = milp.solve(problem)
    assert problem.size(x) <= problem.limit
    assert problem.single[x].sum() == pytest.approx(best, rel=1e-5, abs=1e-12)


@pytest.mark.skipif(os.name != "posix", reason="redirects a file descriptor")
def test_what_the_solver_library_prints_is_no_result(capfd):
    sys.stdout.write("before\n")
    with milp.stdout_to_stderr():
        ctypes.CDLL(None).printf(b"noise\n")
    sys.stdout.write("after\n")
    captured = capfd.readouterr()
    assert captured.out == "before\nafter\n"
    assert captured.err == "noise\n"


@pytest.mark.parametrize("seed", SEEDS)
def test_paired_is_near_the_best_with_interactions(seed):
    problem = random_problem(seed, units=6)
    losses = sorted(problem.loss(x) for x in all_allocations(problem))
    x = paired.solve(problem)
    assert problem.size(x) <= problem.limit
    # no neighbour by one or two moves is better, and of all that fit few are
    assert all(change >= -1e-4 * problem.loss(x) for _, change in paired.moves(problem, x, 5))
    assert problem.loss(x) <= losses[len(losses) // 100] + 1e-12


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("share", SHARES)
def test_every_solver_keeps_the_limit_and_leaves_nothing_that_helps(name, share):
    for seed in SEEDS:
        problem = random_problem(seed, interacting=False, share=share)
        x = SOLVERS[name](problem)
        assert problem.size(x) <= problem.limit
        assert [problem.unit[choice] for choice in x] == list(range(len(problem.units)))
        loss, size = problem.changes(x)
        assert not ((loss < -1e-4 * problem.loss(x)) & (size <= problem.limit - problem.size(x))).any()


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_beats_random_allocations(name):
    for seed in SEEDS:
        problem = random_problem(seed, units=12, interacting=False, gaps=False)
        random = [problem.loss(random_allocation(problem, number)) for number in range(5)]
        assert problem.loss(SOLVERS[name](problem)) < sum(random) / len(random)


def test_waterfill_meets_the_closed_form_where_it_is_exact():
    """c 2^(-2 r) with equal sizes: the best rates differ by half the log of the ratio of c, here whole numbers."""
    bits = np.arange(2, 9)
    scale = np.repeat([1.0, 4.0, 16.0], len(bits))
    losses = scale * 4.0 ** -np.tile(bits, 3)
    problem = Problem(
        units=[("a",), ("b",), ("c",)],
        unit=np.repeat(range(3), len(bits)),
        bits=np.tile(bits, 3),
        bytes=10 * np.tile(bits, 3),
        constant=0.0,
        linear=np.zeros(21),
        products=np.diag(losses),
        limit=10 * (4 + 5 + 6),
    )
    assert problem.plan(waterfill.solve(problem)) == {"a": 4, "b": 5, "c": 6}


def test_changes_are_differences_of_losses_and_bytes():
    problem = random_problem(3)
    x = random_allocation(problem, 0)
    loss, size = problem.changes(x)
    both = problem.pair_changes(x, np.arange(len(problem.unit)))
    for i in range(len(problem.unit)):
        y = paired.apply(problem, x, (i,))
        assert loss[i] == pytest.approx(problem.loss(y) - problem.loss(x), abs=1e-12)
        assert size[i] == problem.size(y) - problem.size(x)
        for j in range(len(problem.unit)):
            if problem.unit[i] != problem.unit[j]:
                z = paired.apply(problem, y, (j,))
                expected = problem.loss(z) - problem.loss(x)
                assert loss[i] + loss[j] + both[i, j] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["greedy", "paired"])
def test_the_true_loss_has_the_last_word(name):
    """The prediction is of another problem than the truth; what is returned is at least as good as without."""
    for seed in SEEDS:
        problem, truth = random_problem(seed, units=6), random_problem(seed, units=6)
        rng = np.random.default_rng(seed + 100)
        true = {}

        def true_loss(plan, truth=truth, rng=rng, true=true):
            key = tuple(plan.values())
            x = np.array([np.flatnonzero((truth.unit == u) & (truth.bits == b))[0] for u, b in enumerate(key)])
            return true.setdefault(key, truth.loss(x) * rng.uniform(0.5, 1.5))

        without = problem.plan(SOLVERS[name](problem))
        found = problem.plan(SOLVERS[name](replace(problem, true_loss=true_loss)))
        assert true_loss(found) <= true_loss(without)
        if name == "paired":
            uniform = problem.plan(paired.uniform_starts(problem)[-1])
            assert true_loss(found) <= true_loss(uniform)
            assert len(true) <= paired.MOST_TRIALS + paired.BEST + 4


def test_one_choice_for_each_unit_is_a_plan():
    problem = random_problem(0)
    only = replace(
        problem,
        unit=np.arange(5),
        bits=problem.bits[problem.lowest],
        bytes=problem.bytes[problem.lowest],
        linear=problem.linear[problem.lowest],
        products=problem.products[np.ix_(problem.lowest, problem.lowest)],
        limit=problem.size(problem.lowest),
    )
    for name, solver in SOLVERS.items():
        assert list(solver(only)) == list(range(5)), name


def test_greedy_goes_down_where_going_up_stalls():
    """Two layers that only gain together: raising one alone costs."""
    vectors = np.array([[1.0], [0.0], [-1.0], [0.0]])  # both at low bits cancel
    problem = Problem(
        units=[("a",), ("b",), ("c",)],
        unit=np.array([0, 0, 1, 1, 2, 2]),
        bits=np.array([2, 4, 2, 4, 2, 4]),
        bytes=np.array([2, 4, 2, 4, 2, 4]),
        constant=0.0,
        linear=np.array([0.2, 0.0, 0.2, 0.0, 0.1, 0.0]),
        products=np.pad(vectors @ vectors.T, (0, 2)),
        limit=12,
    )
    assert problem.plan(greedy.climb(problem)) == {"a": 2, "b": 2, "c": 4}
    assert problem.plan(greedy.solve(problem)) == {"a": 4, "b": 4, "c": 4}


def test_greedy_goes_down_where_a_byte_costs_least():
    """Losses of the lower bits, for bytes saved: 0.3 for 4, 0.2 for 1, 0.1 for 2."""
    problem = Problem(
        units=[("a",), ("b",), ("c",)],
        unit=np.array([0, 0, 1, 1, 2, 2]),
        bits=np.array([2, 4, 2, 4, 2, 4]),
        bytes=np.array([4, 8, 1, 2, 2, 4]),
        constant=0.0,
        linear=np.array([0.3, 0.0, 0.2, 0.0, 0.1, 0.0]),
        products=np.zeros((6, 6)),
        limit=0,
    )
    for limit, expected in ((14, (4, 4, 4)), (12, (4, 4, 2)), (9, (2, 4, 2)), (7, (2, 2, 2))):
        assert tuple(problem.plan(greedy.slide(replace(problem, limit=limit))).values()) == expected


@pytest.fixture(scope="module")
def real(measured):
    reader = CheckpointReader(measured)
    return Sensitivity.load(measured / SENSITIVITY_FILE, reader), ModelSizes.of(reader)


def problem_of(real, **options):
    found, sizes = real
    middle = (sizes.of_plan(sizes.smallest).weights + sizes.of_plan(sizes.largest).weights) // 2
    return Problem.build(found, sizes, middle, **options)


def test_a_real_problem_has_the_bytes_of_the_checkpoint(real):
    problem = problem_of(real)
    for seed in range(3):
        x = random_allocation(problem, seed)
        assert problem.size(x) == real[1].of_plan(problem.plan(x)).weights


def test_layers_that_share_a_call_get_equal_bits(real):
    problem = problem_of(real, together=True)
    for solver in SOLVERS.values():
        plan = problem.plan(solver(problem))
        for block in range(2):
            attention, mlp = f"model.layers.{block}.self_attn", f"model.layers.{block}.mlp"
            assert len({plan[f"{attention}.{name}_proj"] for name in "qkv"}) == 1
            assert plan[f"{mlp}.gate_proj"] == plan[f"{mlp}.up_proj"]
    # the loss of a unit is that of its layers together
    alone = problem_of(real)
    x = problem.lowest
    assert problem.loss(x) == pytest.approx(alone.loss(alone.lowest))


def test_fused_units_keep_every_layer_once():
    names = [f"h.{b}.{n}" for b in range(2) for n in ("q_proj", "o_proj", "k_proj", "v_proj", "w1", "w2", "w3")]
    units = fused_units(names)
    assert sorted(name for unit in units for name in unit) == sorted(names)
    assert ("h.1.q_proj", "h.1.k_proj", "h.1.v_proj") in units
    assert ("h.0.w1", "h.0.w3") in units


def test_bounds_hold_and_later_patterns_win(real):
    bounds = Bounds({"*": 3, "*.q_proj": 2}, {"*.down_proj": 3})
    problem = problem_of(real, bounds=bounds)
    for solver in SOLVERS.values():
        for name, bits in problem.plan(solver(problem)).items():
            assert bits >= (2 if name.endswith("q_proj") else 3)
            assert bits <= (3 if name.endswith("down_proj") else 4)


@pytest.mark.parametrize(
    ("bounds", "named"),
    [
        (Bounds({"*.nothing": 3}, {}), "'\\*.nothing' matches no layer"),
        (Bounds({"*.q_proj": 4}, {"*.q_proj": 3}), "between the bounds 4 and 3"),
        (Bounds({"*": 5}, {}), "between the bounds 5 and 8"),
        (Bounds({"*": 4}, {}), "need at least"),
    ],
)
def test_bounds_that_leave_no_plan_are_named(real, bounds, named):
    with pytest.raises(UsageError, match=named):
        problem_of(real, bounds=bounds)
