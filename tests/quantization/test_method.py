"""Choosing a method: wrong names and values are usage errors that say what is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitstrata.errors import ModelError, PreflightError, UsageError
from bitstrata.options import QuantizeOptions
from bitstrata.quantization.settings import Settings
from bitstrata.quantization.state import differences
from bitstrata.solvers import BCQ, METHODS, PRESETS, AnyBCQ, make_method
from bitstrata.solvers.grouping import check_weight


def test_every_method_can_be_made_at_every_preset() -> None:
    assert set(METHODS) == {"rtn", "bcq", "anybcq", "anyprecision", "nested", "bpdq", "gptq"}
    for name in METHODS:
        for preset in PRESETS:
            assert make_method(name, preset, {}).name == name


def test_presets_and_overrides_in_that_order() -> None:
    assert make_method("anybcq", "default", {}) == AnyBCQ()
    assert make_method("anybcq", "fast", {}).steps == 0
    assert make_method("anybcq", "best", {"steps": 7}).steps == 7
    assert not make_method("anybcq", "fast", {}).needs_calibration
    assert make_method("anybcq", "default", {}).needs_calibration
    assert not make_method("bcq", "best", {}).needs_calibration


def test_options_from_a_command_line_are_converted() -> None:
    options = make_method(
        "anybcq", "default", {"steps": "12", "learning_rate": "1e-2", "share_chain": "True", "train_offset": "false"}
    )
    assert options == AnyBCQ(steps=12, learning_rate=0.01, share_chain=True, train_offset=False)
    assert make_method("anybcq", "default", {"learning_rate": 1}).learning_rate == 1.0


@pytest.mark.parametrize(
    ("name", "preset", "overrides", "names"),
    [
        ("awq", "default", {}, ["'awq'", "anybcq, anyprecision, bcq", "rtn"]),
        ("bcq", "slow", {}, ["'slow'", "fast, default, best"]),
        ("bcq", "default", {"steps": 1}, ["'steps'", "rounds, asymmetric"]),
        ("rtn", "default", {"rounds": 1}, ["'rounds'", "none"]),
        ("bcq", "default", {"rounds": "many"}, ["rounds", "int", "'many'"]),
        ("bcq", "default", {"rounds": "1.5"}, ["rounds", "int", "'1.5'"]),
        ("bcq", "default", {"rounds": 1.5}, ["rounds", "int", "1.5"]),
        ("bcq", "default", {"rounds": True}, ["rounds", "int", "True"]),
        ("bcq", "default", {"asymmetric": "1"}, ["asymmetric", "bool", "'1'"]),
        ("bcq", "default", {"asymmetric": 1}, ["asymmetric", "bool", "1"]),
        ("bcq", "default", {"rounds": 0}, ["rounds must be at least 1"]),
        ("anybcq", "default", {"steps": -1}, ["steps"]),
        ("anybcq", "default", {"batch_size": 0}, ["batch_size"]),
        ("anybcq", "default", {"input_mix": 1.5}, ["input_mix"]),
        ("anybcq", "default", {"learning_rate": -1.0}, ["learning_rate"]),
        ("anybcq", "default", {"learning_rate": "nan"}, ["learning_rate"]),
        ("anyprecision", "default", {"kmeans_bits": 0}, ["kmeans_bits must lie in 1..8"]),
        ("anyprecision", "default", {"steps": 1}, ["'steps'", "fisher, kmeans_bits"]),
    ],
)
def test_wrong_choices_are_named(name: str, preset: str, overrides: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        make_method(name, preset, overrides)
    said = f"{caught.value.message} {caught.value.hint}"
    assert caught.value.exit_code == 2
    for part in names:
        assert part in said, f"{part!r} is not in {said!r}"


def test_options_cannot_be_changed_later() -> None:
    with pytest.raises(AttributeError):
        BCQ().rounds = 3  # type: ignore[misc]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 65520.0, -1e30])
def test_a_weight_that_cannot_be_stored_is_refused_by_name(value: float) -> None:
    weight = torch.zeros(2, 3)
    weight[1, 2] = value
    with pytest.raises(ModelError, match="layer seven"):
        check_weight("layer seven", weight)
    for method in ("rtn", "bcq", "anyprecision"):
        with pytest.raises(ModelError):
            make_method(method, "default", {}).solve_layer(weight, (2,), 2)


def test_the_largest_fp16_number_can_be_stored() -> None:
    check_weight("a weight", torch.tensor([[65504.0, -65504.0]]))


def parse(**changes: Any) -> Settings:
    return Settings.parse(QuantizeOptions("model", "out", **{"method": "bcq", "device": "cpu", **changes}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"bits": "0"}, "'0'"),
        ({"bits": [2, 9]}, "[2, 9]"),
        ({"group_size": 0}, "--group-size must be at least 1, got 0"),
        ({"num_samples": 0}, "--num-samples"),
        ({"seq_len": 1}, "--seq-len"),
        ({"seed": -1}, "--seed"),
        ({"device": "abacus"}, "'abacus'"),
        ({"skip": ["re:("]}, "re:("),
        ({"method": "anybcq"}, "anybcq needs calibration text"),
    ],
)
def test_each_wrong_argument_is_named_with_a_hint(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(PreflightError) as caught:
        parse(**changes)
    (problem,) = caught.value.problems
    assert named in problem.message
    assert problem.hint
    assert caught.value.exit_code == 2


def test_all_wrong_arguments_are_listed_together() -> None:
    with pytest.raises(PreflightError) as caught:
        parse(bits="abc", method="foo", group_size=-1, seed=-5, device="abacus")
    assert len(caught.value.problems) == 5
    for part in ("1. ", "5. ", "abc", "foo", "group-size", "seed", "abacus", "5 problems"):
        assert part in caught.value.message


def test_anybcq_without_training_needs_no_text() -> None:
    assert isinstance(parse(method="anybcq", preset="fast").method, AnyBCQ)


def test_differences_are_told_by_name() -> None:
    found = {"bits": [2, 3], "options": {"steps": 1, "rounds": 20}, "text": None}
    wanted = {"bits": [2, 3], "options": {"steps": 2, "rounds": 20}, "text": "abc", "new": 1}
    lines = ["new was None, is now 1", "options.steps was 1, is now 2", "text was None, is now abc"]
    assert differences(found, wanted) == lines
    assert differences(found, found) == []
