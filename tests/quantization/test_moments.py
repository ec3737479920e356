"""Which linears read what, in which order, and the second moments of it."""

from __future__ import annotations

import pytest
import torch
from block_task import HIDDEN, INNER, make_task
from hessian_helpers import correlated, moments_of, rows_of

from bitstrata.errors import ModelError
from bitstrata.quantization.moments import moments, stages, with_weights


@pytest.mark.parametrize("transposed", [False, True])
def test_stages_are_in_the_order_of_the_block(transposed):
    task = make_task((2, 3), transposed=transposed)
    assert stages(task) == [["up"], ["down"]]
    assert not any(module._forward_pre_hooks for module in task.block.modules())


def test_linears_that_read_one_tensor_are_one_stage():
    task = make_task((2,))

    class Twice(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.left, self.right, self.down = block.up, torch.nn.Linear(HIDDEN, INNER), block.down

        def forward(self, hidden):
            return hidden + self.down(self.left(hidden) * self.right(hidden))

    task.block = Twice(task.block)
    task.weights = {"down": torch.zeros(1), "right": torch.zeros(1), "left": torch.zeros(1)}
    assert stages(task) == [["left", "right"], ["down"]]


def test_a_linear_that_is_never_run_is_named():
    task = make_task((2,))
    task.block.idle = torch.nn.Linear(4, 4)
    task.weights = {**task.weights, "idle": task.block.idle.weight}
    with pytest.raises(ModelError, match="never runs idle"):
        stages(task)


@pytest.mark.parametrize("transposed", [False, True])
def test_moments_are_those_of_the_inputs(transposed, seed):
    task = make_task((2, 4), seed=seed % 1000, transposed=transposed)
    coarse = {bits: {"up": (task.weights["up"] * 2**bits).round() / 2**bits} for bits in (2, 4)}
    found = moments(task, ["down"], coarse)
    original = torch.tanh(task.inputs @ task.weights["up"].T).flatten(0, 1).double()
    for bits in (2, 4):
        quantized = torch.tanh(task.chains[bits] @ coarse[bits]["up"].T).flatten(0, 1).double()
        torch.testing.assert_close(found[bits].hessian.double(), quantized.T @ quantized / 30, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[bits].cross.double(), original.T @ quantized / 30, rtol=1e-4, atol=1e-6)
        assert found[bits].tokens == 30
    # the block is as it was
    with torch.no_grad():
        assert torch.equal(task.block(task.inputs), task.targets)


def test_weights_are_put_back_after_an_error():
    task = make_task((2,))

    def fail():
        with with_weights(task, {"up": torch.zeros(INNER, HIDDEN)}):
            assert not task.block.up.weight.any()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with torch.no_grad():
        assert torch.equal(task.block(task.inputs), task.targets)


def test_the_target_is_the_least_squares_answer_to_quantized_inputs(seed):
    x = torch.randn(400, 20, generator=torch.Generator().manual_seed(seed + 2))
    original = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    weight = rows_of(6, 20, seed)
    found = moments_of(x, original).target(weight, 1e-9, 1.0)
    expected = torch.linalg.lstsq(x.double(), original.double() @ weight.double().T).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    half = moments_of(x, original).target(weight, 1e-9, 0.5)
    torch.testing.assert_close(half, (weight + found) / 2, rtol=1e-4, atol=1e-5)


def test_where_the_chains_agree_the_target_is_the_weight(seed):
    weight, found = rows_of(6, 20, seed), moments_of(correlated(20, seed))
    assert torch.equal(found.target(weight, 0.01, 1.0), weight)
    assert found.target(weight, 0.01, 0.0) is weight


@pytest.mark.parametrize("inputs", ["few tokens", "dead channels", "nothing"])
def test_rank_deficient_moments_are_damped(inputs, seed):
    x = correlated(20, seed, tokens=5 if inputs == "few tokens" else 100)
    if inputs == "dead channels":
        x[:, [0, 7]] = 0
    if inputs == "nothing":
        x[:] = 0
    found = moments_of(x, x * 1.1)
    torch.linalg.cholesky(found.damped(0.01))
    target = found.target(rows_of(4, 20, seed), 0.01, 1.0)
    assert target.isfinite().all()
    assert target.abs().max() < 10
