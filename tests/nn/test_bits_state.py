"""How bits travel: set, nested, restored, refused, and never shared between models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers import dense_output, plane_model
from torch import nn

from bitstrata.errors import UnsupportedBitsError, UsageError
from bitstrata.nn import BitsState, bits_state, use_bits
from bitstrata.nn.bits import expand_rows


def test_the_highest_bits_are_used_until_told_otherwise(model, x):
    assert bits_state(model).value == 4
    torch.testing.assert_close(model(x), dense_output(model, x, 4, 4))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_an_int_is_the_uniform_plan(model, x, bits):
    with use_bits(model, bits):
        y = model(x)
    torch.testing.assert_close(y, dense_output(model, x, bits, bits))


def test_a_plan_gives_each_layer_its_bits(model, x):
    with use_bits(model, {"0": 2, "1": 4}):
        y = model(x)
    torch.testing.assert_close(y, dense_output(model, x, 2, 4))


def test_nested_blocks_restore_the_block_around_them(model, x):
    state = bits_state(model)
    plan = {"0": 3, "1": 2}
    with use_bits(model, 2):
        with use_bits(model, plan):
            assert state.value is plan
            torch.testing.assert_close(model(x), dense_output(model, x, 3, 2))
        assert state.value == 2
        torch.testing.assert_close(model(x), dense_output(model, x, 2, 2))
    assert state.value == 4


def test_an_exception_restores_too(model):
    with pytest.raises(KeyboardInterrupt), use_bits(model, 2):
        raise KeyboardInterrupt
    assert bits_state(model).value == 4


@pytest.mark.parametrize("bad", [5, {"0": 2}, torch.ones(2), "3"], ids=["bits", "plan", "tensor", "text"])
def test_a_refused_value_leaves_the_old_one(model, bad):
    entered = False
    with pytest.raises(UsageError), use_bits(model, bad):
        entered = True
    assert not entered
    assert bits_state(model).value == 4


def test_what_is_set_stays_until_the_next(model):
    state = bits_state(model)
    for value in (3, {"0": 2, "1": 2}, 2):
        state.value = value
        assert state.value == value
    state.value = None
    assert state.value == 4


def test_two_models_do_not_affect_each_other(x, seed):
    first, second = plane_model(seed), plane_model(seed)
    with use_bits(first, 2):
        assert bits_state(second).value == 4
        torch.testing.assert_close(second(x), dense_output(second, x, 4, 4))
        with use_bits(second, 3):
            torch.testing.assert_close(first(x), dense_output(first, x, 2, 2))


def test_a_deep_copy_has_a_state_of_its_own_that_its_layers_share(model, x):
    copied = copy.deepcopy(model)
    assert bits_state(copied) is not bits_state(model)
    assert copied[0].bits_state is copied[1].bits_state
    with use_bits(copied, 2):
        torch.testing.assert_close(copied(x), dense_output(model, x, 2, 2))
        torch.testing.assert_close(model(x), dense_output(model, x, 4, 4))


@pytest.mark.parametrize("bits", [1, 5, 0, -2, 9])
def test_unsupported_bits_are_refused_and_the_supported_listed(model, bits):
    with pytest.raises(UnsupportedBitsError, match=f"bits={bits} is not available") as caught:
        bits_state(model).value = bits
    assert caught.value.hint == "supported bits: 2, 3, 4"


@pytest.mark.parametrize("value", [True, False, 3.0, "3", [], [2, "3"], [2, [3]], (True, 2)], ids=repr)
def test_anything_but_an_int_a_plan_or_a_tensor_is_refused(model, value):
    with pytest.raises(UsageError, match="bits must be an int, a plan"):
        bits_state(model).value = value


def test_a_single_bit_model_does_not_take_true_for_one():
    with pytest.raises(UsageError, match="got True"):
        BitsState({"a": (1,)}).value = True


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        pytest.param({"0": 2}, r"1 layers missing, 0 unknown \(for example 1\)", id="layer-missing"),
        pytest.param({}, "2 layers missing, 0 unknown", id="empty"),
        pytest.param({"0": 2, "1": 2, "2": 2}, r"0 layers missing, 1 unknown \(for example 2\)", id="layer-unknown"),
        pytest.param({"0": 2, "one": 2}, "1 layers missing, 1 unknown", id="misspelt"),
    ],
)
def test_a_plan_must_name_exactly_the_layers(model, plan, message):
    with pytest.raises(UsageError, match=message):
        bits_state(model).value = plan


def test_a_plan_with_unsupported_bits_names_the_layer(model):
    with pytest.raises(UnsupportedBitsError, match="bits=7 is not available in layer 1"):
        bits_state(model).value = {"0": 2, "1": 7}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool], ids=str)
def test_per_row_bits_must_be_integers(model, dtype):
    with pytest.raises(UsageError, match="per-row bits must be an integer tensor"):
        bits_state(model).value = torch.ones(2).to(dtype)


def test_a_model_without_quantized_layers_says_so():
    with pytest.raises(UsageError, match="Sequential has no quantized layers") as caught:
        bits_state(nn.Sequential(nn.Linear(3, 3)))
    assert "bitstrata.load" in caught.value.hint


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("row_bits", "token_bits"),
    [
        pytest.param([2, 4], [[2, 2, 2], [4, 4, 4]], id="batch"),
        pytest.param([[2, 3, 4], [4, 3, 2]], [[2, 3, 4], [4, 3, 2]], id="batch-and-sequence"),
        pytest.param([2, 3, 4, 4, 3, 2], [[2, 3, 4], [4, 3, 2]], id="rows"),
        pytest.param(3, [[3, 3, 3], [3, 3, 3]], id="scalar"),
    ],
)
def test_a_tensor_gives_each_row_its_bits(model, x, row_bits, token_bits, dtype):
    with use_bits(model, torch.tensor(row_bits, dtype=dtype)):
        y = model(x)
    for b in range(2):
        for s in range(3):
            bits = token_bits[b][s]
            torch.testing.assert_close(y[b, s], dense_output(model, x[b, s], bits, bits))


def test_a_batch_and_sequence_tensor_fits_flattened_rows(model, x):
    row_bits = torch.tensor([[2, 3, 4], [4, 3, 2]])
    with use_bits(model, row_bits):
        assert torch.equal(model(x.flatten(0, 1)), model(x).flatten(0, 1))


@pytest.mark.parametrize("shape", [(3,), (5,), (7,), (3, 2), (2, 2), (2, 3, 1, 2), (1, 2, 3)], ids=str)
def test_a_tensor_that_fits_no_dimension_is_refused(model, x, shape):
    with (
        pytest.raises(UsageError, match=r"per-row bits of shape .* do not fit an input of \[2, 3\] rows"),
        use_bits(model, torch.full(shape, 2)),
    ):
        model(x)


def test_a_row_with_unsupported_bits_is_refused(model, x):
    with pytest.raises(UnsupportedBitsError, match="5"), use_bits(model, torch.tensor([2, 5])):
        model(x)
    assert bits_state(model).value == 4


@pytest.mark.parametrize(
    ("row_bits", "shape", "expected"),
    [
        ([2, 3], (2, 2), [2, 2, 3, 3]),
        ([2, 3], (2, 1), [2, 3]),
        ([[2, 3], [3, 4]], (2, 2), [2, 3, 3, 4]),
        ([[2, 3]], (1, 2, 2), [2, 2, 3, 3]),
        ([2, 3, 4, 4], (2, 2), [2, 3, 4, 4]),
        ([[2], [3]], (2,), [2, 3]),
        ([], (0,), []),
        ([], (0, 3), []),
    ],
)
def test_expand_rows(row_bits, shape, expected):
    assert expand_rows(torch.tensor(row_bits, dtype=torch.int8), torch.Size(shape)).tolist() == expected


def test_switching_bits_copies_no_weight(model, x):
    addresses = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    for bits in (2, 3, 4):
        with use_bits(model, bits):
            model(x)
            assert model[0].plane_weight().planes[0].data_ptr() == addresses["0.plane_0"]
    assert {name: buffer.data_ptr() for name, buffer in model.named_buffers()} == addresses


@pytest.mark.parametrize(
    "three", [np.int8(3), np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor(3, dtype=torch.uint8)], ids=repr
)
def test_whole_numbers_of_other_libraries_are_bits(model, x, three):
    expected = dense_output(model, x, 3, 3)
    with use_bits(model, three):
        assert bits_state(model).value == 3
        torch.testing.assert_close(model(x), expected)
    assert type(bits_state(model).resolve(three).given) is int
    with use_bits(model, {"0": three, "1": np.int64(2)}):
        torch.testing.assert_close(model(x), dense_output(model, x, 3, 2))
    with use_bits(model, [three, np.int32(2)]):
        y = model(x)
    torch.testing.assert_close(y[1], dense_output(model, x[1], 2, 2))
    torch.testing.assert_close(y[0], dense_output(model, x[0], 3, 3))


@pytest.mark.parametrize("value", [np.float64(3), np.bool_(True), torch.tensor(3.0), torch.tensor(True), "3"], ids=repr)
def test_what_is_no_whole_number_is_refused_with_the_supported_ones(model, value):
    with pytest.raises(UsageError) as caught:
        bits_state(model).value = value
    if not isinstance(value, torch.Tensor):
        assert caught.value.hint == "supported bits: 2, 3, 4"
    with pytest.raises(UnsupportedBitsError, match="layer 0"):
        bits_state(model).value = {"0": value, "1": 2}
    assert bits_state(model).value == 4


def test_unsupported_whole_numbers_of_other_libraries(model):
    for seven in (np.int64(7), torch.tensor(7)):
        with pytest.raises(UnsupportedBitsError, match="bits=7") as caught:
            bits_state(model).value = seven
        assert caught.value.hint == "supported bits: 2, 3, 4"


class Pair(nn.Module):
    def __init__(self, target, draft):
        super().__init__()
        self.target, self.draft = target, draft


def test_two_models_in_one_module_are_not_switched_by_half(x, seed):
    both = Pair(plane_model(seed), plane_model(seed + 1))
    with (
        pytest.raises(UsageError, match=r"several quantized models.*target.*draft") as caught,
        use_bits(both, 2),
    ):
        pass
    assert "use_bits(module.<name>, bits)" in caught.value.hint
    assert bits_state(both.target).value == bits_state(both.draft).value == 4
    with use_bits(both.target, 2):
        torch.testing.assert_close(both.target(x), dense_output(both.target, x, 2, 2))
        torch.testing.assert_close(both.draft(x), dense_output(both.draft, x, 4, 4))


def test_one_model_twice_in_a_module_is_one(model):
    both = Pair(model, model)
    with use_bits(both, 2):
        assert bits_state(model).value == 2


def test_setting_inside_a_block_lasts_until_its_end(model):
    state = bits_state(model)
    with use_bits(model, 2):
        state.value = 3
        assert state.value == 3
        with use_bits(model, 2):
            pass
        assert state.value == 3
    assert state.value == 4
    state.value = 3
    with use_bits(model, 2):
        pass
    assert state.value == 3


def test_a_copy_made_inside_a_block_keeps_its_bits(model, x):
    with use_bits(model, 2):
        twin = copy.deepcopy(model)
    for _ in range(2):
        assert bits_state(twin).value == 2
        with use_bits(twin, 3):
            torch.testing.assert_close(twin(x), dense_output(model, x, 3, 3))
