"""bpdq, gptq and nested as methods: against textbook forms, and on blocks."""

from __future__ import annotations

import itertools

import pytest
import torch
from block_task import make_task
from moments_helpers import correlated, loss, moments_of, rows_of

from bitstrata.planes import decode
from bitstrata.solvers import BPDQ, GPTQ, METHODS, Nested, make_method
from bitstrata.solvers.gptq import grid

N, K = 11, 70


def plain_gptq(weight, hessian, bits, group_size, order):
    """One column at a time with the inverse Hessian of what is left, in float64 (the form before Cholesky)."""
    left, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    decoded, grids = torch.empty_like(left), {}
    static = order.tolist() != list(range(K))
    for step, column in enumerate(order.tolist()):
        group = column // group_size
        if group not in grids:
            columns = torch.arange(group * group_size, min(K, (group + 1) * group_size))
            source = weight if static else left
            grids[group] = [part.double() for part in grid(source[:, columns].T.float(), bits)]
        half, middle = grids[group]
        value = ((left[:, column] - middle) / (2 * half) + (2**bits - 1) / 2).round().clamp(0, 2**bits - 1)
        decoded[:, column] = middle + half * (2 * value - (2**bits - 1))
        error = (left[:, column] - decoded[:, column]) / inverse[column, column]
        rest = order[step + 1 :]
        left[:, rest] -= error.unsqueeze(1) * inverse[column, rest]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return decoded


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [16, 70, 200])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_is_the_plain_form(act_order, group_size, bits, seed):
    weight, found = rows_of(N, K, seed), moments_of(correlated(K, seed))
    order = found.diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(K)
    expected = plain_gptq(weight, found.damped(0.01), bits, group_size, order)
    solved = GPTQ(act_order=act_order).solve(weight, {bits: found}, group_size)
    near = ((decode(solved, bits, torch.float64) - expected).abs() < 1e-4).double().mean()
    assert near > 0.97  # a tie that falls the other way moves what follows it
    torch.testing.assert_close(
        loss(weight, decode(solved, bits, torch.float32), found.damped(0.01)).sum(),
        loss(weight, expected.float(), found.damped(0.01)).sum(),
        rtol=0.05,
        atol=0,
    )


def test_gptq_crosses_the_boundary_between_stretches_of_columns(seed):
    weight, found = rows_of(5, 300, seed), moments_of(correlated(300, seed))
    coarse = GPTQ().solve(weight, {3: found}, 100)
    rounding = GPTQ().solve(weight, {3: moments_of(torch.eye(300))}, 100)
    hessian = found.damped(0.01)
    assert loss(weight, decode(coarse, 3), hessian).sum() < 0.7 * loss(weight, decode(rounding, 3), hessian).sum()


def test_without_correlation_gptq_rounds_to_nearest(seed):
    weight = rows_of(5, 64, seed)
    solved = GPTQ().solve(weight, {4: moments_of(torch.eye(64))}, 32)
    for group in range(2):
        columns = slice(32 * group, 32 * group + 32)
        half, _ = grid(weight[:, columns].T, 4)
        error = (decode(solved, 4)[:, columns] - weight[:, columns]).abs()
        assert (error <= half.unsqueeze(1) * 1.05 + 1e-6).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_bpdq_beats_gptq_and_nested_alone_beats_bpdq(bits, seed):
    weight, found = rows_of(48, 128, seed), moments_of(correlated(128, seed))
    hessian = found.damped(0.01)
    losses = {
        name: float(
            loss(weight, decode(make_method(name, "default", {}).solve(weight, {bits: found}, 32), bits), hessian).sum()
        )
        for name in ("gptq", "bpdq", "nested")
    }
    assert losses["nested"] < losses["bpdq"] < losses["gptq"]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("method", [Nested(), BPDQ(), GPTQ()], ids=lambda method: method.name)
def test_blocks(method, transposed, seed):
    bits = (2, 3, 4) if method.nests else (3,)
    task = make_task(bits, seed=seed % 1000, transposed=transposed)
    solved = method.solve_block(task)
    assert list(solved) == list(task.weights)
    for name, weight in solved.items():
        assert weight.bits == bits
        errors = [float((decode(weight, b) - task.weights[name]).norm() / task.weights[name].norm()) for b in bits]
        assert errors[-1] < 0.5, name
    with torch.no_grad():
        assert torch.equal(task.block(task.inputs), task.targets), "the block is as it was"


def test_nested_losses_are_monotone_for_every_row(seed):
    weight, found = rows_of(40, 96, seed), moments_of(correlated(96, seed))
    bits = (1, 2, 3, 4, 6, 8)
    solved = Nested().solve(weight, dict.fromkeys(bits, found), 32)
    losses = [loss(weight, decode(solved, b), found.damped(0.01)) for b in bits]
    for fewer, more in itertools.pairwise(losses):
        assert (more <= fewer * (1 + 1e-5)).all()
    assert losses[-1].sum() < 4e-3 * losses[1].sum()


def test_fast_needs_no_text_and_beats_rounding(seed):
    weight = rows_of(20, 100, seed)  # the last group is shorter
    fast = make_method("nested", "fast", {})
    assert not fast.needs_calibration
    assert fast.tuning is None
    solved = fast.solve_layer(weight, (2, 3, 4), 32)
    plain = make_method("rtn", "default", {}).solve_layer(weight, (2, 3, 4), 32)
    bcq = make_method("bcq", "default", {}).solve_layer(weight, (2, 3, 4), 32)
    for bits in (2, 3, 4):
        mine, theirs = ((decode(w, bits) - weight).square().sum() for w in (solved, plain))
        assert mine < theirs, bits
    total = [sum(float((decode(w, b) - weight).square().sum()) * 4**b for b in (2, 3, 4)) for w in (solved, bcq)]
    assert total[0] < total[1]


@pytest.mark.parametrize("name", ["nested", "bpdq", "gptq"])
@pytest.mark.parametrize("inputs", ["few tokens", "dead channels", "nothing"])
def test_rank_deficient_inputs(name, inputs, seed):
    x = correlated(K, seed, tokens=9 if inputs == "few tokens" else 100)
    if inputs == "dead channels":
        x[:, [0, 13]] = 0
    if inputs == "nothing":
        x[:] = 0
    method, weight = METHODS[name](), rows_of(N, K, seed)
    bits = (2, 4) if method.nests else (4,)
    solved = method.solve(weight, dict.fromkeys(bits, moments_of(x, x * 1.05)), 32)
    for b in bits:
        assert decode(solved, b).isfinite().all()
    alive = x.abs().sum(0) > 0
    if inputs == "dead channels":
        error = (decode(solved, bits[-1]) - weight)[:, alive]
        assert error.norm() < 0.4 * weight[:, alive].norm()


def test_too_few_tokens_are_reported():
    said = []
    task = make_task((2,), said=said)
    task.inputs, task.chains = task.inputs[:1], {2: task.chains[2][:1]}
    Nested(iterations=1, sweeps=0).solve_block(task)
    assert any("5 calibration tokens for 24 inputs" in line for line in said)
