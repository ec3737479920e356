"""Metrics and targets against float64: in place, by panels, in memory and in files."""

from __future__ import annotations

import itertools

import pytest
import torch
from moments_helpers import correlated, loss, moments_of, rows_of
from torch import Tensor

from bitstrata import scratch
from bitstrata.planes import decode
from bitstrata.scratch import Scratch
from bitstrata.solvers import METHODS, Moments, metric
from bitstrata.solvers.metric import cholesky_, invert_, prepare, stretches, upper_factor

K, N = 70, 13


def by_panels(moments: Moments, ends: tuple[int, ...]) -> Moments:
    """The same in panels, NaN below the diagonal of H, which must not count."""
    hessian, drift = moments.hessian, moments.cross - moments.hessian
    hessian = torch.where(torch.ones_like(hessian).tril(-1) > 0, torch.nan, hessian)
    spans = list(zip((0, *ends), ends, strict=False))
    return Moments(ends, [hessian[:b, a:b] for a, b in spans], [drift[:, a:b] for a, b in spans], moments.tokens)


def problem(seed: int) -> tuple[Tensor, Moments]:
    x = correlated(K, seed)
    return rows_of(N, K, seed), moments_of(x, x + 0.1 * correlated(K, seed + 1))


@pytest.mark.parametrize("size", [1, 2, 65, 300])
@pytest.mark.parametrize(("block", "strip"), [(256, 2048), (7, 16), (1, 1)])
def test_factors_are_made_in_place(
    size: int, block: int, strip: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metric, "BLOCK", block)
    monkeypatch.setattr(metric, "STRIP", strip)
    hessian = moments_of(correlated(size, seed)).damped(0.01).double()
    matrix = hessian.clone().mT  # symmetric, so stored by columns
    place = matrix.data_ptr()
    cholesky_(matrix)
    expected = torch.linalg.cholesky(hessian)
    torch.testing.assert_close(matrix, expected)
    invert_(matrix)
    assert matrix.data_ptr() == place
    assert torch.equal(matrix, matrix.tril())
    torch.testing.assert_close(matrix @ expected, torch.eye(size).double(), rtol=0, atol=1e-9)


def test_what_is_not_positive_definite_is_refused() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        cholesky_(torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64).mT)


@pytest.mark.parametrize("ends", [(K,), (1, 30, 31, K), tuple(range(1, K + 1))], ids=lambda ends: f"{len(ends)} panels")
@pytest.mark.parametrize("groups", [(K,), (16, 16, 16, 16, 6), (6, 64)], ids=str)
@pytest.mark.parametrize("files", [False, True], ids=["memory", "files"])
def test_metric_and_targets_are_those_of_float64(
    ends: tuple[int, ...], groups: tuple[int, ...], files: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, moments = problem(seed)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    if files:
        monkeypatch.setattr(scratch, "IN_MEMORY", 0)
        monkeypatch.setattr(metric, "IN_MEMORY", 4 * K)
    monkeypatch.setattr(metric, "PIECE", 3 * K)
    found, targets = prepare(weight, by_panels(moments, ends), order, groups, damping=0.01, correction=0.7)
    assert isinstance(found.hessian, Scratch) == files
    damped = moments.damped(0.01)[order][:, order]
    factor = upper_factor(damped)
    spans = list(itertools.pairwise(itertools.accumulate(groups, initial=0)))
    for (start, end), rows, passed in zip(spans, found.hessian, found.factor, strict=True):
        assert torch.equal(rows, damped[start:end])
        torch.testing.assert_close(passed, factor[start:end, start:], rtol=1e-5, atol=1e-5)
    drift = (moments.cross - moments.hessian).double()
    change = weight.double() @ drift @ torch.linalg.inv(moments.damped(0.01).double())
    expected = (weight + 0.7 * change)[:, order].T
    assert len(targets) == len(stretches(N, K)) == (4 if files else 1)
    torch.testing.assert_close(torch.cat(list(targets), 1).double(), expected, rtol=1e-5, atol=1e-5)


def test_losses_are_those_of_the_whole_matrix(seed: int) -> None:
    weight, moments = problem(seed)
    found, _ = prepare(weight, moments, torch.arange(K), [30, 40], damping=0.01)
    errors = [rows_of(N, K, seed + more).T for more in (2, 3)]
    for error, mine in zip(errors, found.losses(errors), strict=True):
        expected = torch.einsum("kn,kj,jn->n", error.double(), moments.damped(0.01).double(), error.double())
        torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["nested", "gptq", "bpdq"])
def test_files_leave_no_trace_and_stretches_lose_nothing(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moments = problem(seed)
    bits = (2, 3) if name == "nested" else (3,)
    method = METHODS[name]()
    expected = method.solve(weight, dict.fromkeys(bits, moments), 16)
    monkeypatch.setattr(scratch, "IN_MEMORY", 0)
    found = method.solve(weight, dict.fromkeys(bits, moments), 16)
    for value in bits:
        assert torch.equal(decode(found, value), decode(expected, value))
    monkeypatch.setattr(metric, "IN_MEMORY", 4 * K)  # four rows at a time
    found, hessian = method.solve(weight, dict.fromkeys(bits, moments), 16), moments.damped(0.01)
    for value in bits:
        mine, whole = (loss(weight, decode(one, value), hessian).sum() for one in (found, expected))
        assert 0.9 * whole < mine < 1.1 * whole  # a row's rounds end when those of all rows at a time do
