"""Policies by themselves: on recorded arrivals in virtual time, and on recorded entropies."""

from __future__ import annotations

import json
import random
from itertools import groupby, pairwise
from pathlib import Path
from statistics import mean, quantiles
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation import BASE, PROMPT, ROW, Simulated, simulate

from bitstrata.errors import UsageError
from bitstrata.runtime import EntropyPolicy, LoadPolicy, Policy, PositionPolicy, StructurePolicy, parse_policy
from bitstrata.runtime.batching.stats import WINDOW, Pace
from bitstrata.runtime.policy import LoadView, Passage, RequestView

TRACES = Path(__file__).parent / "traces"
TARGET_MS = 40.0  # 7 requests at 4 bits take 40 ms a token in the simulation, 8 at 3 bits 37
TEXTS = ["fixed", f"load:target_ms={TARGET_MS:g}", "position:tokens=5", "entropy:low=0.2,high=0.3"]
TEXTS += ["structure:structured=6,prose=3", f"{TEXTS[1]},prompts=1"]


PASSAGES = get_args(Passage)


def recorded(**asked) -> list[Simulated]:
    trace = json.loads((TRACES / "arrivals.json").read_text())["arrivals"]
    return [Simulated(time, new, **asked) for time, new in trace]


@pytest.fixture(scope="module")
def entropies() -> list[list[float]]:
    return json.loads((TRACES / "entropies.json").read_text())["entropies"]


def follow(policy: Policy, entropies: list[float], ladder=(8, 6, 4, 2)) -> list[int]:
    """The bits of a request's tokens: entropies[i] is that of the distribution which gave token i."""
    steps, supported = policy.start(), tuple(sorted(ladder))
    views = [
        RequestView(max(ladder), min(ladder), supported, made, entropies[made - 1] if made else None)
        for made in range(len(entropies))
    ]
    return [view.lowered(steps(view)) for view in views]


def runs(values: list[int]) -> list[tuple[int, int]]:
    """[2, 2, 3] -> [(2, 2), (3, 1)]: values and how often each comes in a row."""
    return [(value, len(list(same))) for value, same in groupby(values)]


@given(data=st.data(), text=st.sampled_from(TEXTS))
def test_no_policy_leaves_what_the_request_allows(data, text):
    policy = parse_policy(text)
    supported = tuple(sorted(data.draw(st.sets(st.integers(1, 8), min_size=1))))
    bits = data.draw(st.sampled_from(supported))
    min_bits = data.draw(st.none() | st.sampled_from(supported))
    steps, now = policy.start(), 0.0
    for made in range(data.draw(st.integers(1, 30))):
        now += data.draw(st.floats(0, 2))
        passage = data.draw(st.sampled_from(PASSAGES)) if made else None
        view = RequestView(bits, min_bits, supported, made, data.draw(st.floats(0, 1)) if made else None, passage)
        pace = data.draw(st.none() | st.floats(0, 1))
        policy.observe(LoadView(now, data.draw(st.integers(0, 9)), pace, len(view.ladder) - 1))
        chosen = view.lowered(steps(view))
        assert chosen in supported
        assert min(bits, bits if min_bits is None else min_bits) <= chosen <= bits
        if made == 0 and text != TEXTS[-1]:
            assert chosen == bits


@pytest.mark.parametrize("text", TEXTS)
def test_requests_without_min_bits_are_never_lowered(text):
    requests = recorded(min_bits=None)
    for index, request in enumerate(requests):
        request.min_bits = 2 if index % 2 else None
    simulate(parse_policy(text), requests)
    assert {bits for request in requests[::2] for bits in request.used} == {4}


# by load, on recorded bursts


@pytest.fixture(scope="module")
def loaded():
    """(policy, requests, rounds) of the recorded arrivals under a LoadPolicy."""
    policy, requests = LoadPolicy(TARGET_MS), recorded()
    return policy, requests, simulate(policy, requests)


def test_under_bursts_bits_stay_within_the_request_and_use_all_of_its_room(loaded):
    _, requests, _ = loaded
    assert {bits for request in requests for bits in request.used} == {2, 3, 4}
    assert {request.used[0] for request in requests} == {4}, "prompts are at full bits"


def test_steps_are_single_and_lie_a_dwell_apart(loaded):
    policy, _, rounds = loaded
    changes = [(after.now, after.steps - before.steps) for before, after in pairwise(rounds) if after != before]
    changes = [change for change in changes if change[1]]
    assert len(changes) >= 4
    assert all(step == 1 for _, step in changes if step > 0)
    for (earlier, _), (later, _) in pairwise(changes):
        assert later - earlier >= policy.dwell_ms / 1000


def test_it_goes_down_soon_when_behind_and_comes_back_after_every_burst(loaded):
    policy, _, rounds = loaded
    dwell = policy.dwell_ms / 1000
    behind_since, calm_since = None, rounds[0].now
    for before, after in pairwise(rounds):
        if after.behind != before.behind:
            behind_since, calm_since = (after.now, None) if after.behind else (None, after.now)
        # a queue of fewer than `queue` may stand for a while; one of a second and a half has grown
        if behind_since is not None and after.now - behind_since > 1.5:
            assert after.steps > 0, f"at {after.now:.2f} s"
        if calm_since is not None and after.now - calm_since > 10 * dwell:
            assert after.steps == 0, f"at {after.now:.2f} s"
    assert rounds[-1].steps == 0


def test_it_shortens_the_waits_of_a_burst_for_a_small_part_of_the_bits(loaded):
    _, requests, _ = loaded
    fixed, lowest = recorded(), recorded(bits=2)
    simulate(Policy(), fixed)
    simulate(Policy(), lowest)
    late = [quantiles([request.latency for request in way], n=20)[-1] for way in (fixed, requests, lowest)]
    assert late[1] < 0.6 * late[0]
    assert late[2] <= late[1]
    assert 2.2 < mean(bits for request in requests for bits in request.used) < 4


def test_prompts_are_lowered_only_when_that_is_asked_for():
    requests = recorded()
    simulate(LoadPolicy(TARGET_MS, prompts=1), requests)
    assert {request.used[0] for request in requests} == {2, 3, 4}


def steady(running: int, count: int = 200, new: int = 40) -> list[Simulated]:
    """Requests that come so that about `running` run at a time, at 4 bits."""
    round_seconds = BASE + running * (ROW[4] * (new - 1) + PROMPT) / new
    return [Simulated(index * round_seconds * new / running, new) for index in range(count)]


def test_a_constant_load_just_under_the_target_keeps_full_bits():
    policy, requests = LoadPolicy(TARGET_MS), steady(6)
    simulate(policy, requests)
    assert {bits for request in requests for bits in request.used} == {4}
    strict = LoadPolicy(0.9 * (BASE + 6 * ROW[4]) * 1000)  # the same load would be above this target
    simulate(strict, steady(6))
    assert strict.steps > 0


def test_a_constant_load_above_the_target_settles_instead_of_swinging():
    policy = LoadPolicy(TARGET_MS)
    rounds = simulate(policy, [Simulated(0.0, 400) for _ in range(8)])  # 45 ms at 4 bits, 37 at 3
    assert runs([item.steps for item in rounds])[1:] == [(1, len(rounds) - runs([r.steps for r in rounds])[0][1])]


def test_after_being_without_work_it_starts_at_the_top_but_not_within_the_dwell():
    policy = LoadPolicy(10.0, dwell_ms=500)
    policy.observe(LoadView(1.0, 0, 0.02, 2))
    assert policy.steps == 1
    policy.observe(LoadView(1.4, 0, None, 2))
    assert policy.steps == 1
    policy.observe(LoadView(1.5, 0, 0.02, 2))
    assert policy.steps == 2
    policy.observe(LoadView(2.0, 0, None, 2))
    assert policy.steps == 0


def test_steps_do_not_pile_up_beyond_what_requests_allow():
    policy = LoadPolicy(10.0, dwell_ms=0)
    for second in range(20):
        policy.observe(LoadView(float(second), 50, 0.1, steps=1))
    assert policy.steps == 1
    policy.observe(LoadView(20.0, 0, 0.1, steps=0))
    assert policy.steps == 1, "a round without requests to lower changes nothing"


def test_between_the_thresholds_nothing_changes_and_room_must_last():
    policy = LoadPolicy(10.0, low=0.5, queue=3, dwell_ms=1000)
    policy.observe(LoadView(0.0, 3, 0.001, 2))
    assert policy.steps == 1
    for now, waiting, pace in [(2.0, 2, 0.001), (3.0, 0, 0.006), (4.0, 0, 0.009), (4.9, 0, 0.004)]:
        policy.observe(LoadView(now, waiting, pace, 2))
        assert policy.steps == 1, now
    policy.observe(LoadView(5.0, 0, 0.004, 2))
    assert policy.steps == 0


# by position and entropy


def test_position_goes_down_in_equal_stretches():
    used = follow(PositionPolicy(tokens=5), [0.5] * 23)
    assert runs(used) == [(8, 5), (6, 5), (4, 5), (2, 8)]


def test_entropy_lowers_a_sure_request_and_leaves_an_unsure_one(entropies):
    policy = EntropyPolicy()
    by_flatness = sorted(entropies, key=mean)
    sure, unsure = follow(policy, by_flatness[0]), follow(policy, by_flatness[-1])
    assert mean(sure) < 4.5
    assert mean(unsure) > 7


def test_entropy_without_memory_steps_at_every_token():
    policy = EntropyPolicy(low=0.2, high=0.3, weight=1, hold=1)
    assert follow(policy, [0.1, 0.1, 0.25, 0.5, 0.1, 0.1, 0.1, 0.1, 0.9, 0]) == [8, 6, 4, 4, 6, 4, 2, 2, 2, 4]


def test_entropy_follows_its_definition(entropies):
    for sequence in entropies:
        policy = EntropyPolicy(low=0.2, high=0.35, weight=0.3, hold=3)
        used = follow(policy, sequence)
        weights = [0.3 * 0.7**back for back in range(len(sequence))]
        since = 0
        for made in range(1, len(used)):
            seen = sequence[:made]  # the first has the weight of all that is missing
            average = (
                sum(w * h for w, h in zip(weights, reversed(seen[1:]), strict=False)) + 0.7 ** (made - 1) * seen[0]
            )
            if used[made] != used[made - 1]:
                assert made - since >= 3
                assert (average < 0.2) == (used[made] < used[made - 1])
                assert average < 0.2 or average > 0.35
                since = made
            elif made - since >= 3:
                assert 0.2 <= average <= 0.35 or used[made] == (2 if average < 0.2 else 8)


def test_a_flat_stretch_raises_a_sure_request_again(entropies):
    by_flatness = sorted(entropies, key=mean)
    spliced = by_flatness[0][:60] + by_flatness[-1][:40]
    used = follow(EntropyPolicy(), spliced)
    assert used[59] == 2
    assert used[-1] == 8


def test_entropy_between_the_thresholds_changes_nothing():
    chance = random.Random(1)
    assert set(follow(EntropyPolicy(low=0.2, high=0.4), [chance.uniform(0.21, 0.39) for _ in range(100)])) == {8}
    swinging = [0.05, 0.6] * 50  # from the ninth token on their mean, until then low, stays between
    assert runs(follow(EntropyPolicy(low=0.2, high=0.45, weight=0.1, hold=8), swinging)) == [(8, 9), (6, 91)]


def test_requests_do_not_share_what_is_remembered_of_them(entropies):
    policy = EntropyPolicy()
    alone = [follow(policy, sequence) for sequence in entropies]
    together = [policy.start() for _ in entropies]
    for made in range(len(entropies[0])):
        for index, steps in enumerate(together):
            view = RequestView(8, 2, (2, 4, 6, 8), made, entropies[index][made - 1] if made else None)
            assert view.lowered(steps(view)) == alone[index][made]


def test_a_prompt_that_is_computed_again_is_so_at_its_bits():
    for policy in (EntropyPolicy(low=0.9, high=1, hold=1), PositionPolicy(tokens=1), StructurePolicy()):
        steps = policy.start()
        for made in range(1, 9):
            steps(RequestView(8, 2, (2, 4, 8), made, 0.1, "prose"))
        again = RequestView(8, 2, (2, 4, 8), 0)
        assert again.lowered(steps(again)) == 8


# by structure


@pytest.mark.parametrize(
    ("text", "ladder", "prose", "structured"),
    [
        ("structure", (2, 3, 4), 2, 4),
        ("structure:prose=3", (2, 3, 4), 3, 4),
        ("structure:structured=3", (2, 3, 4), 2, 3),
        ("structure:structured=5,prose=3", (2, 4, 8), 2, 4),
        ("structure:structured=2,prose=1", (4, 6, 8), 4, 4),
        ("structure", (4,), 4, 4),
    ],
)
def test_structure_takes_the_nearest_bits_below_that_a_request_allows(text, ladder, prose, structured):
    steps = parse_policy(text).start()
    used = {}
    for passage in (None, *PASSAGES):
        view = RequestView(max(ladder), min(ladder), ladder, 1 if passage else 0, passage=passage)
        used[passage] = view.lowered(steps(view))
    assert used == {
        None: max(ladder), "prose": prose, "forced": prose, "structure": structured, "opening": structured
    }  # fmt: skip


# texts, and the pace


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("fixed", Policy()),
        (" load: target_ms = 50", LoadPolicy(50)),
        ("load:target_ms=2.5,queue=1,low=0.5,dwell_ms=0", LoadPolicy(2.5, 0.5, 1, 0)),
        ("position", PositionPolicy()),
        ("position:tokens=7", PositionPolicy(7)),
        ("entropy:high=0.4,hold=2", EntropyPolicy(high=0.4, hold=2)),
        ("structure", StructurePolicy()),
        ("structure:structured=4,prose=2", StructurePolicy(4, 2)),
        ("structure:mend=1", StructurePolicy(mend=1)),
    ],
)
def test_policies_are_read_from_texts_and_say_what_they_are(text, policy):
    assert parse_policy(text) == policy
    assert parse_policy(str(policy)) == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "policy '' is not known"),
        ("fast", "policy 'fast' is not known"),
        ("load", "load needs a target"),
        ("load:low=0.5", "load needs a target"),
        ("load:50", "no setting '50'"),
        ("load:target_ms", "target_ms= must be a number"),
        ("load:target_ms=fast", "target_ms=fast must be a number"),
        ("load:target_ms=50,queue=1.5", "queue=1.5 must be a whole number"),
        ("load:target_ms=50,target_ms=60", "given twice"),
        ("load:target_ms=0", "load:target_ms=0,.* cannot be used"),
        ("load:target_ms=nan", "cannot be used"),
        ("load:target_ms=5,low=1", "cannot be used"),
        ("load:target_ms=5,prompts=2", "cannot be used"),
        ("load:target_ms=5,steps=1", "no setting 'steps'"),
        ("fixed:bits=3", "no setting 'bits'"),
        ("position:tokens=0", "cannot be used"),
        ("entropy:low=0.5,high=0.4", "cannot be used"),
        ("entropy:weight=0", "cannot be used"),
        ("structure:prose=5,structured=4", "cannot be used"),
        ("structure:prose=0", "cannot be used"),
        ("structure:structured=9", "cannot be used"),
        ("structure:mend=2", "cannot be used"),
    ],
)
def test_texts_that_are_no_policy_are_refused_by_name(text, message):
    with pytest.raises(UsageError, match=message) as caught:
        parse_policy(text)
    assert caught.value.hint or "given twice" in message or "must be" in message


def test_the_pace_is_a_mean_of_rounds_that_forgets():
    pace = Pace()
    assert pace.mean is None
    for _ in range(4):
        pace.add(WINDOW / 100)
        pace.add(3 * WINDOW / 100)
    assert pace.mean == pytest.approx(2 * WINDOW / 100, rel=0.02), "every round counts once, however long"
    for _ in range(1000):
        pace.add(WINDOW / 100)
    assert pace.mean == pytest.approx(WINDOW / 100, rel=0.01)
    pace.clear()
    assert pace.mean is None
