"""A list of bits and plans: rows of one batch, each at its own."""

from __future__ import annotations

import pytest
import torch
from helpers import dense_output

from bitstrata.errors import UnsupportedBitsError, UsageError
from bitstrata.nn import bits_state, together, use_bits

PLANS = ({"0": 2, "1": 4}, 3, {"0": 4, "1": 4}, {"0": 2, "1": 3})
LAYER_BITS = ((2, 4), (3, 3), (4, 4), (2, 3))


@pytest.mark.parametrize(
    ("rows", "token_choices"),
    [
        pytest.param([0, 1], [[0, 0, 0], [1, 1, 1]], id="batch"),
        pytest.param([0, 1, 2, 3, 3, 0], [[0, 1, 2], [3, 3, 0]], id="rows"),
        pytest.param([2, 2], [[2, 2, 2], [2, 2, 2]], id="equal"),
    ],
)
def test_each_row_runs_at_its_own_plan(model, x, rows, token_choices):
    with use_bits(model, [PLANS[row] for row in rows]):
        y = model(x)
    for b in range(2):
        for s in range(3):
            expected = dense_output(model, x[b, s], *LAYER_BITS[token_choices[b][s]])
            torch.testing.assert_close(y[b, s], expected)


def test_a_layer_at_which_all_rows_agree_gets_an_int(model):
    state = bits_state(model)
    with use_bits(model, [{"0": 2, "1": 4}, 4, {"1": 4, "0": 3}]):
        assert state.bits_for("1", torch.Size([3])) == 4
        assert isinstance(state.bits_for("1", torch.Size([3])), int)
        rows = state.bits_for("0", torch.Size([3, 2]))
    assert rows.tolist() == [2, 2, 4, 4, 3, 3]
    assert rows.dtype == torch.int8


@pytest.mark.parametrize(
    "bits", [[{"0": 2, "1": 2}, 4], [2, 4], torch.tensor([2, 4]), torch.tensor([[2, 2, 2], [4, 4, 4]])], ids=str
)
def test_layers_of_equal_bits_get_one_tensor(model, bits):
    state, shape = bits_state(model), torch.Size([2, 3])
    with use_bits(model, bits):
        assert state.bits_for("0", shape) is state.bits_for("1", shape)
        assert state.bits_for("0", shape).tolist() == [2, 2, 2, 4, 4, 4]
        with state.step(tokens=torch.zeros(2, 3, dtype=torch.int64)):
            rows = state.bits_for("0", torch.Size([6]))
            assert rows is state.bits_for("1", torch.Size([6]))
            assert rows.tolist() == [2, 2, 2, 4, 4, 4]


def test_what_was_checked_does_not_change_afterwards(model, x):
    rows, plan = torch.tensor([2, 3]), {"0": 2, "1": 4}
    with use_bits(model, rows):
        rows.fill_(9)
        torch.testing.assert_close(model(x)[1], dense_output(model, x[1], 3, 3))
    with use_bits(model, plan):
        plan["0"] = 9
        torch.testing.assert_close(model(x), dense_output(model, x, 2, 4))


def test_resolved_bits_of_several_requests_go_together(model):
    state = bits_state(model)
    two, plan, same = state.resolve(2), state.resolve({"0": 2, "1": 4}), state.resolve({"1": 4, "0": 2})
    assert together([plan, same], [1, 2]) is plan, "one choice is no tensor"
    with use_bits(model, together([two, plan, same], [2, 1, 1])):
        assert state.bits_for("0", torch.Size([4])) == 2
        assert state.bits_for("1", torch.Size([4])).tolist() == [2, 2, 4, 4]


@pytest.mark.parametrize(
    ("bits", "error", "message"),
    [
        ([2, "3"], UsageError, "got '3'"),
        ([2, torch.tensor([3])], UsageError, "got tensor"),
        ([2, True], UsageError, "got True"),
        ([2, 5], UnsupportedBitsError, "bits=5"),
        ([2, {"0": 2}], UsageError, "1 layers missing"),
        ([2, {"0": 2, "1": 7}], UnsupportedBitsError, "layer 1"),
    ],
)
def test_what_a_model_cannot_run_is_refused_and_the_old_value_stays(model, bits, error, message):
    with pytest.raises(error, match=message):
        bits_state(model).value = bits
    assert bits_state(model).value == 4


def test_rows_that_fit_no_dimension_are_refused(model, x):
    plan = {"0": 3, "1": 4}
    with (
        pytest.raises(UsageError, match=r"per-row bits of shape \[5\] do not fit"),
        use_bits(model, [2, plan, 2, plan, plan]),
    ):
        model(x)


@pytest.mark.parametrize("rows", [torch.tensor([2, 3, 4]), [2, 3, 4], [2, 2, 2]], ids=str)
def test_a_step_refuses_rows_that_are_not_its_tokens(model, rows):
    with pytest.raises(UsageError, match="do not fit"), bits_state(model).step(rows, torch.zeros(2, 4)):
        pass
