"""AnyBCQ on one block: bits do not influence each other, training is optional, chains are the right ones."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from block_task import make_task

from bitstrata.errors import ModelError
from bitstrata.planes import AffineScales, PlaneWeight, decode
from bitstrata.quantization.block_task import BlockTask
from bitstrata.solvers import BCQ, AnyBCQ

TRAINED = AnyBCQ(rounds=4, steps=10, batch_size=4)


def solve(task: BlockTask, method: AnyBCQ = TRAINED) -> dict[str, PlaneWeight]:
    return method.solve_block(task)


def changed(**values: Any) -> AnyBCQ:
    return dataclasses.replace(TRAINED, **values)


def assert_equal(one: PlaneWeight, other: PlaneWeight, names: list[str] | None = None) -> None:
    for name in names if names is not None else one.tensors():
        assert torch.equal(one.tensors()[name], other.tensors()[name]), f"{name} differs"


def differs(one: PlaneWeight, other: PlaneWeight, name: str) -> bool:
    return not torch.equal(one.tensors()[name], other.tensors()[name])


def test_without_training_it_is_bcq() -> None:
    """On these weights BCQ's fallback, which AnyBCQ lacks, has nothing to do."""
    task = make_task((2, 3, 4))
    found = solve(task, AnyBCQ(rounds=4, steps=0))
    for name, weight in task.weights.items():
        assert_equal(found[name], BCQ(rounds=4).solve_layer(weight, (2, 3, 4), 16))


def test_without_training_no_activations_are_needed() -> None:
    task = make_task((2, 3))
    task.inputs, task.targets, task.chains = None, None, {}
    assert set(solve(task, AnyBCQ(rounds=2, steps=0))) == {"up", "down"}


def test_a_learning_rate_of_zero_returns_the_start(seed: int) -> None:
    still = solve(make_task((2, 3), seed=seed % 1000), changed(learning_rate=0.0))
    untrained = solve(make_task((2, 3), seed=seed % 1000), changed(steps=0))
    for name in still:
        assert_equal(still[name], untrained[name])


def test_the_reported_error_never_rises_and_is_the_stored_weights_error() -> None:
    said: list[str] = []
    task = make_task((2, 3, 4), said=said)
    found = solve(task)
    assert len(said) == 3
    assert task.targets is not None
    for bits, line in zip((2, 3, 4), said, strict=True):
        before, after = (float(value) for value in re.findall(r"\d\.\d+e[+-]\d+", line))
        assert line.startswith(f"bits {bits}:")
        assert after < before
        for name, weight in found.items():
            task.block.get_submodule(name).weight.data = decode(weight, bits)
        error = float((task.block(task.chains[bits]) - task.targets).square().mean())
        assert error == pytest.approx(after, rel=1e-3), f"{bits} bits"


@pytest.mark.parametrize("asymmetric", [True, False])
def test_adding_bits_leaves_planes_and_scales_below_as_they_were(asymmetric: bool, seed: int) -> None:
    method = changed(asymmetric=asymmetric)
    alone, pair, many = (solve(make_task(bits, seed=seed % 1000), method) for bits in ((2,), (2, 3), (2, 3, 4)))
    for name in many:
        assert_equal(alone[name], pair[name])
        assert_equal(pair[name], many[name])
        assert pair[name].tensors().keys() < many[name].tensors().keys()


def test_bits_that_are_left_out_get_a_plane_but_no_scales() -> None:
    found = solve(make_task((2, 4)))
    for weight in found.values():
        assert weight.bits == (2, 4)
        assert len(weight.planes) == 4


def test_each_bits_is_trained_on_its_own_chain() -> None:
    plain, other = make_task((2, 3, 4)), make_task((2, 3, 4))
    other.chains = {**other.chains, 3: other.chains[3] + 1}
    one, two = solve(plain), solve(other)
    assert_equal(one["up"], two["up"], ["plane_0", "plane_1", "plane_2", "scale_2", "offset_2"])
    assert differs(one["up"], two["up"], "scale_3")


def test_a_shared_chain_is_that_of_the_highest_bits() -> None:
    method = changed(share_chain=True)
    results = []
    for spoiled in (None, 2, 3, 4):
        task = make_task((2, 3, 4))
        task.chains = {bits: chain + (bits == spoiled) for bits, chain in task.chains.items()}
        results.append(solve(task, method)["down"])
    plain, lowest, middle, highest = results
    assert_equal(plain, middle)
    assert differs(plain, lowest, "scale_2"), "the lowest bits keep their own chain"
    assert differs(plain, highest, "scale_3"), "3 bits are trained on the chain of 4"
    assert_equal(plain, highest, ["scale_2", "offset_2"])


@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_pure_inputs_of_either_kind_work(mix: float) -> None:
    said: list[str] = []
    found = solve(make_task((2, 3), said=said), changed(input_mix=mix))
    assert len(said) == 2
    for weight in found.values():
        assert bool(decode(weight, 3).isfinite().all())


def test_a_symmetric_solution_has_no_offsets() -> None:
    for weight in solve(make_task((2, 3)), changed(asymmetric=False)).values():
        for scales in weight.scales.values():
            assert isinstance(scales, AffineScales)
            assert not bool(scales.offset.any())


def test_transposed_linears_are_solved_like_plain_ones() -> None:
    plain, transposed = (solve(make_task((2, 3), transposed=flag)) for flag in (False, True))
    untrained = solve(make_task((2, 3), transposed=True), changed(steps=0))
    for name in plain:
        assert_equal(plain[name], transposed[name], ["plane_0", "plane_1"])
        assert differs(transposed[name], untrained[name], "scale_2"), "nothing was trained"
        # the same sums in another order
        torch.testing.assert_close(decode(plain[name], 2), decode(transposed[name], 2), atol=2e-3, rtol=0)


def test_a_weight_that_cannot_be_stored_is_refused_by_name() -> None:
    task = make_task((2,))
    task.weights["down"][0, 0] = torch.nan
    with pytest.raises(ModelError, match="down"):
        solve(task)
