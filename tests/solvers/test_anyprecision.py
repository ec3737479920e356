"""Any-Precision on layers and on a block: nested codes, tables of weighted means, sensitivities where they belong."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from block_task import make_task
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitstrata.errors import ModelError
from bitstrata.planes import Codebook, codes, decode
from bitstrata.solvers import AnyPrecision, anyprecision, make_method

seeds = st.integers(0, 2**31 - 1)


def draw(seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Weights and sensitivities; some of both are 0."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    fisher = torch.randn(rows, columns, generator=generator).exp() * 1e-8
    for tensor in (weight, fisher):
        tensor[torch.rand(rows, columns, generator=generator) < 0.1] = 0
    return weight, fisher


def error(dense: Tensor, weight: Tensor, fisher: Tensor) -> Tensor:
    """Weighted squared error of each row, as the method counts it."""
    counted = fisher.double() * (weight != 0)
    counted[counted.sum(1) == 0] = 1
    return (counted * (dense.double() - weight.double()).square()).sum(1)


@given(seeds, st.integers(1, 60), st.integers(1, 5), st.integers(0, 3), st.booleans())
def test_codes_are_prefixes_and_errors_fall(seed: int, columns: int, lowest: int, more: int, weighted: bool) -> None:
    weight, fisher = draw(seed, 4, columns)
    bits = tuple(range(lowest, lowest + more + 1))
    found = AnyPrecision().solve_layer(weight, bits, 16, fisher if weighted else None)
    assert (found.bits, found.group_size, len(found.planes)) == (bits, 16, bits[-1])
    finest, order, errors = codes(found, bits[-1]), weight.argsort(dim=1, stable=True), []
    for p in bits:
        code = codes(found, p)
        assert torch.equal(code, finest >> (bits[-1] - p)), f"seed {seed}"
        assert bool((code.gather(1, order).diff(dim=1) >= 0).all()), f"codes do not grow with the weight (seed {seed})"
        errors.append(error(decode(found, p), weight, fisher if weighted else torch.ones_like(fisher)))
    size = error(torch.zeros_like(weight), weight, fisher if weighted else torch.ones_like(fisher))
    for coarse, fine in itertools.pairwise(errors):
        # tables are rounded to 11 bits at the end
        assert bool((fine.sqrt() <= coarse.sqrt() + 2**-11 * size.sqrt() + 1e-7).all()), f"seed {seed}"


@given(seeds, st.integers(1, 60))
def test_entries_are_weighted_means_of_what_they_stand_for(seed: int, columns: int) -> None:
    weight, fisher = draw(seed, 3, columns)
    found = AnyPrecision().solve_layer(weight, (2, 3, 5), 16, fisher)
    counted = fisher.double() * (weight != 0)
    counted[counted.sum(1) == 0] = 1
    for p in found.bits:
        scales, code = found.scales[p], codes(found, p)
        assert isinstance(scales, Codebook)
        for row, entry in itertools.product(range(3), range(2**p)):
            share = counted[row] * (code[row] == entry)
            if share.sum() > 0:
                mean = float((share * weight[row]).sum() / share.sum())
                assert float(scales.table[row, entry]) == pytest.approx(mean, rel=2**-11, abs=2**-24), f"seed {seed}"


@pytest.mark.parametrize("bits", [(2, 4), (1, 8), (3, 5, 6)])
def test_bits_that_are_left_out_are_split_through(bits: tuple[int, ...], seed: int) -> None:
    weight, fisher = draw(seed, 5, 50)
    some = AnyPrecision().solve_layer(weight, bits, 16, fisher)
    every = AnyPrecision().solve_layer(weight, tuple(range(bits[0], bits[-1] + 1)), 16, fisher)
    tensors = every.tensors()
    for name, tensor in some.tensors().items():
        assert torch.equal(tensor, tensors[name]), f"{name} (seed {seed})"


def test_higher_bits_leave_lower_ones_as_they_are(seed: int) -> None:
    weight, fisher = draw(seed, 5, 50)
    few = AnyPrecision().solve_layer(weight, (2, 3), 16, fisher)
    tensors = AnyPrecision().solve_layer(weight, (2, 3, 4, 5), 16, fisher).tensors()
    for name, tensor in few.tensors().items():
        assert torch.equal(tensor, tensors[name]), f"{name} (seed {seed})"


def test_the_group_size_is_only_noted(seed: int) -> None:
    weight, fisher = draw(seed, 5, 50)
    one, other = (AnyPrecision().solve_layer(weight, (2, 3), size, fisher) for size in (16, 128))
    assert (one.group_size, other.group_size) == (16, 128)
    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


def test_many_rows_are_solved_in_stretches(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, fisher = draw(seed, 9, 40)
    whole = AnyPrecision().solve_layer(weight, (2, 3), 16, fisher).tensors()
    monkeypatch.setattr(anyprecision, "CHUNK", 80)
    for name, tensor in AnyPrecision().solve_layer(weight, (2, 3), 16, fisher).tensors().items():
        assert torch.equal(tensor, whole[name]), f"{name} (seed {seed})"


def test_kmeans_at_the_lowest_bits_is_better_there_than_splitting(seed: int) -> None:
    weight, fisher = draw(seed, 8, 200)
    best, split = (AnyPrecision(kmeans_bits=at).solve_layer(weight, (4,), 16, fisher) for at in (8, 2))
    assert float(error(decode(best, 4), weight, fisher).sum()) < float(error(decode(split, 4), weight, fisher).sum())


def test_sensitive_weights_are_kept_best(seed: int) -> None:
    weight, _ = draw(seed, 8, 200)
    fisher = torch.full_like(weight, 1e-6)
    fisher[:, ::10] = 1.0
    plain, weighted = (AnyPrecision().solve_layer(weight, (3,), 16, f) for f in (None, fisher))
    errors = [(decode(found, 3) - weight)[:, ::10].square().sum() for found in (plain, weighted)]
    assert float(errors[1]) < 0.7 * float(errors[0]), f"seed {seed}"


def test_weights_that_are_zero_do_not_count_and_rows_without_sensitivity_do() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0, 8.0], [0.0] * 6])
    fisher = torch.tensor([[1.0] * 6, [0.0] * 6, [1.0] * 6])
    found = AnyPrecision().solve_layer(weight, (1,), 16, fisher)
    assert decode(found, 1).tolist() == [[1.0] * 5 + [3.0], [0.0] * 5 + [8.0], [0.0] * 6]


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("value", [0.0, 0.75, 0.1, 1e-6, 65504.0, -65504.0])
def test_a_constant_stays_that_constant(value: float, bits: int) -> None:
    found = AnyPrecision().solve_layer(torch.full((2, 40), value), (bits,), 16)
    assert torch.equal(decode(found, bits), torch.full((2, 40), value).half().float())


def test_fewer_columns_than_entries_are_exact_to_fp16() -> None:
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    found = AnyPrecision().solve_layer(weight, tuple(range(3, 9)), 16)
    for p in found.bits:
        assert torch.equal(decode(found, p), weight.half().float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 65520.0])
def test_a_weight_that_cannot_be_stored_is_refused(value: float) -> None:
    weight = torch.zeros(2, 3)
    weight[1, 2] = value
    with pytest.raises(ModelError):
        AnyPrecision().solve_layer(weight, (2,), 16)


def test_every_linear_of_a_block_gets_its_own_sensitivities() -> None:
    task = make_task((2, 3))
    fisher = {name: draw(1, *weight.shape)[1] for name, weight in task.weights.items()}
    found = AnyPrecision().solve_block(dataclasses.replace(task, sensitivity=fisher))
    assert set(found) == {"up", "down"}
    for name, weight in task.weights.items():
        alone = AnyPrecision().solve_layer(weight, (2, 3), task.group_size, fisher[name])
        plain = AnyPrecision().solve_layer(weight, (2, 3), task.group_size)
        for key, tensor in alone.tensors().items():
            assert torch.equal(found[name].tensors()[key], tensor)
        assert not torch.equal(decode(alone, 2), decode(plain, 2))


def test_fast_takes_every_weight_as_equal_and_no_text() -> None:
    fast, default = (make_method("anyprecision", preset, {}) for preset in ("fast", "default"))
    assert (fast.needs, fast.needs_calibration) == (frozenset(), False)
    assert (default.needs, default.needs_calibration) == ({"gradients"}, True)
    task = make_task((2, 3))
    for name, found in fast.solve_block(task).items():
        assert torch.equal(decode(found, 3), decode(fast.solve_layer(task.weights[name], (2, 3), 16), 3))
