"""RowBits: rows of one batch at different plans."""

from __future__ import annotations

import pytest
import torch
from helpers import dense_output

from bitstrata.errors import UnsupportedBitsError, UsageError
from bitstrata.nn import RowBits, bits_state, use_bits

PLANS = ({"0": 2, "1": 4}, 3, {"0": 4, "1": 4}, {"0": 2, "1": 3})
LAYER_BITS = ((2, 4), (3, 3), (4, 4), (2, 3))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("rows", "token_choices"),
    [
        pytest.param([0, 1], [[0, 0, 0], [1, 1, 1]], id="batch"),
        pytest.param([[0, 1, 2], [3, 3, 0]], [[0, 1, 2], [3, 3, 0]], id="batch-and-sequence"),
        pytest.param([0, 1, 2, 3, 3, 0], [[0, 1, 2], [3, 3, 0]], id="rows"),
    ],
)
def test_each_row_runs_at_its_own_plan(model, x, rows, token_choices, dtype):
    with use_bits(model, RowBits(PLANS, torch.tensor(rows, dtype=dtype))):
        y = model(x)
    for b in range(2):
        for s in range(3):
            expected = dense_output(model, x[b, s], *LAYER_BITS[token_choices[b][s]])
            torch.testing.assert_close(y[b, s], expected)


def test_a_layer_at_which_all_rows_agree_gets_an_int():
    bits = RowBits(({"0": 2, "1": 4}, 4, {"1": 4, "0": 3}), torch.tensor([0, 1, 2]))
    assert bits.of("1") == 4
    assert isinstance(bits.of("1"), int)
    assert bits.of("0").tolist() == [2, 4, 3]
    assert bits.of("0").dtype == torch.int8


def test_layers_of_equal_bits_share_one_tensor():
    bits = RowBits(({"a": 2, "b": 2, "c": 3}, 4), torch.tensor([0, 1]))
    assert bits.of("a") is bits.of("b")
    assert bits.of("c").tolist() == [3, 4]


@pytest.mark.parametrize(
    ("choices", "rows", "error", "message"),
    [
        ((), torch.tensor([0]), UsageError, "its 0 choices"),
        ((2, "3"), torch.tensor([0, 1]), UsageError, "got '3'"),
        ((2, torch.tensor([3])), torch.tensor([0, 1]), UsageError, "got tensor"),
        ((2, 3), torch.tensor([0.0, 1.0]), UsageError, "integer tensor"),
        ((2, 3), torch.tensor([0, 2]), UsageError, "its 2 choices"),
        ((2, 3), torch.tensor([0, -1]), UsageError, "its 2 choices"),
        ((2, True), torch.tensor([0, 1]), UsageError, "got True"),
        ((2, 5), torch.tensor([0, 1]), UnsupportedBitsError, "bits=5"),
        ((2, {"0": 2}), torch.tensor([0, 1]), UsageError, "1 layers missing"),
        ((2, {"0": 2, "1": 7}), torch.tensor([0, 1]), UnsupportedBitsError, "layer 1"),
    ],
)
def test_what_a_model_cannot_run_is_refused_and_the_old_value_stays(model, choices, rows, error, message):
    with pytest.raises(error, match=message):
        bits_state(model).set(RowBits(choices, rows))
    assert bits_state(model).value == 4


def test_rows_that_fit_no_dimension_are_refused(model, x):
    with (
        pytest.raises(UsageError, match=r"per-row bits of shape \[5\] do not fit"),
        use_bits(model, RowBits((2, {"0": 3, "1": 4}), torch.tensor([0, 1, 0, 1, 1]))),
    ):
        model(x)
