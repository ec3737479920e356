"""Steps and changes exclude each other; a resident state runs what is in memory and nothing else."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch

from bitstrata.errors import UnsupportedBitsError, UsageError
from bitstrata.nn import ResidentState, RowBits
from bitstrata.nn.resident import Steps

WAIT = 20


def in_thread(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_a_change_waits_for_the_steps_and_later_steps_wait_for_it():
    steps, events = Steps(), []
    entered, leave = threading.Event(), threading.Event()

    def stepping():
        with steps.step():
            entered.set()
            leave.wait(WAIT)
            events.append("step ended")

    def changing():
        with steps.change():
            events.append("changed")

    first = in_thread(stepping)
    assert entered.wait(WAIT)
    change = in_thread(changing)
    while not steps._changing:  # it waits now
        pass
    late = in_thread(lambda: [steps.step().__enter__(), events.append("late step")])
    late.join(0.05)
    assert late.is_alive()
    assert events == []
    leave.set()
    for thread in (first, change, late):
        thread.join(WAIT)
    assert events == ["step ended", "changed", "late step"]


def test_steps_run_side_by_side():
    steps, both = Steps(), threading.Barrier(2, timeout=WAIT)

    def stepping():
        with steps.step():
            both.wait()

    threads = [in_thread(stepping) for _ in range(2)]
    for thread in threads:
        thread.join(WAIT)
    assert not both.broken
    with steps.change():
        pass


def test_a_step_within_a_step_does_not_wait_for_a_change():
    steps, inner = Steps(), threading.Event()
    with steps.step():
        change = in_thread(lambda: steps.change().__enter__())
        while not steps._changing:
            pass
        with steps.step():
            inner.set()
    assert inner.is_set()
    change.join(WAIT)
    assert not change.is_alive()


def test_a_change_from_inside_a_step_is_refused():
    steps = Steps()
    with steps.step(), pytest.raises(UsageError, match="inside its own forward"), steps.change():
        pass
    with steps.change():
        pass


def test_an_error_in_a_step_or_a_change_blocks_nobody():
    steps = Steps()
    with pytest.raises(RuntimeError), steps.step():
        raise RuntimeError
    with pytest.raises(RuntimeError), steps.change():
        raise RuntimeError
    with steps.step(), steps.step():
        pass


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_of_busy_steps_is_free(copied):
    steps = Steps()
    with steps.step(), copied(steps).change():
        pass


def resident(plan):
    state = ResidentState({"a": (2, 3, 4), "b": (2, 3, 4)})
    state.adopt(plan)
    return state


def test_it_follows_what_is_in_memory():
    state = resident({"a": 2, "b": 4})
    assert (state.of("a"), state.of("b"), state.supported) == (2, 4, ())
    kept = state.keep(None)
    state.adopt({"a": 3, "b": 3})
    assert dict(kept) == {"a": 3, "b": 3}
    assert kept is state.keep(3) is state.keep({"a": 3, "b": 3}) is state.default
    assert state.supported == (3,)


def test_setting_it_changes_nothing():
    state = resident({"a": 3, "b": 3})
    previous = state.set(3)
    state.adopt({"a": 4, "b": 2})
    state.value = previous
    assert (state.of("a"), state.of("b")) == (4, 2)


@pytest.mark.parametrize(
    "bits", [2, 9, torch.tensor([3, 2]), RowBits((3, 2), torch.tensor([0, 1])), {"a": 3, "b": 2}, {"a": 3}, True, 3.0]
)
def test_anything_else_is_refused(bits):
    state = resident({"a": 3, "b": 3})
    with pytest.raises(UsageError):
        state.check(bits)
    assert state.set(3) is state.plan


@pytest.mark.parametrize("bits", [torch.tensor([3, 3]), RowBits((3,), torch.tensor([0, 0])), {"b": 3, "a": 3}])
def test_other_ways_of_saying_the_same_are_taken(bits):
    assert resident({"a": 3, "b": 3}).check(bits) == {"a": 3, "b": 3}


def test_the_refusal_says_what_there_is():
    with pytest.raises(UnsupportedBitsError, match="a plan of 2 to 4 bits a layer") as caught:
        resident({"a": 2, "b": 4}).check(3)
    assert caught.value.hint == "leave bits out to run what is in memory, or call model.resize(3)"
