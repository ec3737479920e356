"""Steps and changes exclude each other; a model with one plan's pages runs what is in memory and nothing else."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch

from bitstrata.errors import UnsupportedBitsError, UsageError
from bitstrata.nn import BitsState

WAIT = 20
PLAN = {"a": 3, "b": 3}


def in_thread(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def resident(plan=PLAN):
    state = BitsState(dict.fromkeys(plan, ()), plan={})
    change(state, plan)
    return state


def change(state, plan=PLAN):
    with state.changing(plan):
        pass


def is_changing(state):
    return state._uses._is_changing


def test_a_change_waits_for_the_steps_and_later_steps_wait_for_it():
    state, events = resident(), []
    entered, leave = threading.Event(), threading.Event()

    def stepping():
        with state.step():
            entered.set()
            leave.wait(WAIT)
            events.append("step ended")

    def changing():
        with state.changing(PLAN):
            events.append("changed")

    first = in_thread(stepping)
    assert entered.wait(WAIT)
    waiting = in_thread(changing)
    while not is_changing(state):  # it waits now
        pass
    late = in_thread(lambda: [state.step().__enter__(), events.append("late step")])
    late.join(0.05)
    assert late.is_alive()
    assert events == []
    leave.set()
    for thread in (first, waiting, late):
        thread.join(WAIT)
    assert events == ["step ended", "changed", "late step"]


def test_steps_run_side_by_side_and_blocks_do_not_hinder_a_change():
    state, both = resident(), threading.Barrier(2, timeout=WAIT)

    def stepping():
        with state.step():
            both.wait()

    threads = [in_thread(stepping) for _ in range(2)]
    for thread in threads:
        thread.join(WAIT)
    assert not both.broken
    with state.using(3):
        change(state)


def test_a_step_within_a_step_does_not_wait_for_a_change():
    state, inner = resident(), threading.Event()
    with state.step():
        waiting = in_thread(lambda: change(state))
        while not is_changing(state):
            pass
        with state.step():
            inner.set()
    assert inner.is_set()
    waiting.join(WAIT)
    assert not waiting.is_alive()


def test_a_change_from_inside_a_step_is_refused():
    state = resident()
    with state.step():
        with pytest.raises(UsageError, match="inside its own forward"):
            change(state)
        with pytest.raises(UsageError, match="inside its own forward"):
            state.check_outside()
    change(state)


def test_an_error_in_a_step_or_a_change_blocks_nobody():
    state = resident()
    with pytest.raises(RuntimeError), state.step():
        raise RuntimeError
    with pytest.raises(RuntimeError), state.changing({"a": 2, "b": 2}):
        raise RuntimeError
    assert state.plan == PLAN, "what failed did not change it"
    with state.step(), state.step():
        pass


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_of_a_busy_state_is_free(copied):
    state = resident()
    with state.step():
        twin = copied(state)
        change(twin, {"a": 2, "b": 2})
    assert (twin.value, state.value) == ({"a": 2, "b": 2}, PLAN)


def test_it_follows_what_is_in_memory():
    state, shape = resident({"a": 2, "b": 4}), torch.Size([1])
    assert (state.bits_for("a", shape), state.bits_for("b", shape), state.supported) == (2, 4, ())
    kept = state.resolve(None)
    with state.using({"a": 2, "b": 4}):
        change(state)
        assert (state.bits_for("a", shape), state.bits_for("b", shape)) == (3, 3)
    assert kept.given == {"a": 3, "b": 3}
    assert kept is state.resolve(3) is state.resolve({"a": 3, "b": 3}) is state.resolve(None)
    assert state.default == PLAN
    assert state.supported == (3,)


def test_setting_it_changes_nothing():
    state = resident()
    state.value = 3
    change(state, {"a": 4, "b": 2})
    assert (state.bits_for("a", torch.Size([1])), state.bits_for("b", torch.Size([1]))) == (4, 2)


@pytest.mark.parametrize("bits", [2, 9, torch.tensor([3, 2]), [3, 2], {"a": 3, "b": 2}, {"a": 3}, True, 3.0], ids=str)
def test_anything_else_is_refused(bits):
    state = resident()
    with pytest.raises(UsageError):
        state.resolve(bits)
    assert state.value is state.plan


@pytest.mark.parametrize("bits", [torch.tensor([3, 3]), [3, {"a": 3, "b": 3}], {"b": 3, "a": 3}], ids=str)
def test_other_ways_of_saying_the_same_are_taken(bits):
    state = resident()
    assert state.resolve(bits) is state.resolve(None)


def test_the_refusal_says_what_there_is():
    with pytest.raises(UnsupportedBitsError, match="a plan of 2 to 4 bits a layer") as caught:
        resident({"a": 2, "b": 4}).resolve(3)
    assert caught.value.hint == "leave bits out to run what is in memory, or call model.resize(3)"


@pytest.mark.parametrize("bits", [None, 2, [2, 3], torch.tensor([2, 3])], ids=str)
def test_a_fixed_layer_keeps_its_precision(bits):
    state = BitsState({"a": (2, 3)}, fixed={"head": 6})
    with state.using(bits):
        assert state.bits_for("head", torch.Size([2])) == 6
    assert state.supported == (2, 3)
    assert state.layers == {"a": (2, 3)}


def test_without_bits_a_layer_runs_at_the_highest_it_holds_up_to_that_of_the_model():
    state = BitsState({"a": (2, 3), "b": (2, 3, 8)})
    assert state.value == 3
    assert [state.bits_for(layer, torch.Size([1])) for layer in "ab"] == [3, 3]
    state.value = {"a": 2, "b": 8}
    assert [state.bits_for(layer, torch.Size([1])) for layer in "ab"] == [2, 8]
