"""What a method may ask of a block: which linears read what, in which order, and the second moments of it."""

from __future__ import annotations

import pytest
import torch
from block_task import HIDDEN, INNER, make_task

from bitstrata.errors import ModelError


@pytest.mark.parametrize("transposed", [False, True])
def test_groups_are_in_the_order_of_the_block(transposed):
    task = make_task((2, 3), transposed=transposed)
    assert task.input_groups() == [["up"], ["down"]]
    assert not any(module._forward_pre_hooks for module in task.block.modules())


def test_linears_that_read_one_tensor_are_one_group():
    task = make_task((2,))

    class Twice(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.left, self.right, self.down = block.up, torch.nn.Linear(HIDDEN, INNER), block.down

        def forward(self, hidden):
            return hidden + self.down(self.left(hidden) * self.right(hidden))

    task.block = Twice(task.block)
    task.weights = {"down": torch.zeros(1), "right": torch.zeros(1), "left": torch.zeros(1)}
    assert task.input_groups() == [["left", "right"], ["down"]]


def test_a_linear_that_is_never_run_is_named():
    task = make_task((2,))
    task.block.idle = torch.nn.Linear(4, 4)
    task.weights = {**task.weights, "idle": task.block.idle.weight}
    with pytest.raises(ModelError, match="never runs idle"):
        task.input_groups()


@pytest.mark.parametrize("transposed", [False, True])
def test_moments_are_those_of_the_inputs(transposed, seed):
    task = make_task((2, 4), seed=seed % 1000, transposed=transposed)
    coarse = {bits: {"up": (task.weights["up"] * 2**bits).round() / 2**bits} for bits in (2, 4)}
    found = task.moments(["down"], coarse)
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
        with task.with_weights({"up": torch.zeros(INNER, HIDDEN)}):
            assert not task.block.up.weight.any()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with torch.no_grad():
        assert torch.equal(task.block(task.inputs), task.targets)
