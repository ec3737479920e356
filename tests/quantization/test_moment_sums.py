"""Second moments against float64: sums in fp32 whatever the products are made in, and the same for any threads."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bitstrata import scratch
from bitstrata.kernels.cpu import add_gram
from bitstrata.quantization import moment_sums
from bitstrata.quantization.moment_sums import MomentSums
from bitstrata.scratch import Scratch
from bitstrata.solvers import Moments

CPU = torch.device("cpu")


def inputs(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Of the original and of a chain that is near to it; with channels that are a hundred times the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x[:, ::13] *= 100
    return x, x + 0.05 * x.abs() * torch.randn(rows, columns, generator=generator)


def moments(x: Tensor, y: Tensor, dtype: torch.dtype) -> Moments:
    sums = MomentSums(x.shape[1], CPU)
    for _ in sums.panels:
        for lane in zip(x.chunk(8), y.chunk(8), strict=True):
            for a, b in zip(*(part.split(37) for part in lane), strict=True):
                sums.add(a.to(dtype), b.to(dtype))
            sums.end_lane()
        sums.end_panel()
    return sums.result()


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [1, 15, 16, 50, 400])
def test_they_are_those_of_float64(
    columns: int, dtype: torch.dtype, native: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(moment_sums, "add_gram", lambda *_, **__: False)
    x, y = inputs(700, columns, seed)
    found = moments(x, y, dtype)
    a, b = x.to(dtype).double(), y.to(dtype).double()
    hessian, drift = b.T @ b / 700, (x.to(dtype) - y.to(dtype)).double().T @ b / 700
    assert found.tokens == 700
    for name, mine, expected in (
        ("hessian", found.hessian.double(), hessian),
        ("drift", found.cross.double() - found.hessian.double(), drift),
        ("cross", found.cross.double(), a.T @ b / 700),
    ):
        scale = hessian.norm() if name != "cross" or dtype == torch.float32 else hessian.norm() * 2000
        assert (mine - expected).norm() <= 2e-6 * scale, f"{name}, {columns} columns"
    assert torch.equal(found.hessian, found.hessian.T)
    torch.linalg.cholesky(found.damped(0.01))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("columns", "summed", "kept"), [(1, 1, 1), (50, 3000, 100), (50, 60, 1), (400, 100_000, 7000)])
def test_panels_and_files_change_nothing_but_rounding(
    columns: int, summed: int, kept: int, dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = inputs(700, columns, seed)
    whole = moments(x, y, dtype)
    monkeypatch.setattr(moment_sums, "SUMMED", summed)
    monkeypatch.setattr(moment_sums, "KEPT", kept)
    for module in (scratch, moment_sums):
        monkeypatch.setattr(module, "IN_MEMORY", 0)
    parts = moment_sums.panels(columns)
    assert parts[0][0] == 0
    assert parts[-1][1] == columns
    assert all(one[1] == other[0] for one, other in itertools.pairwise(parts))
    assert all((columns + end) * (end - start) <= summed or end - start == 1 for start, end in parts)
    found = moments(x, y, dtype)
    assert isinstance(found.drift, Scratch)
    assert max(panel.numel() for panel in found.drift) <= max(kept, columns)
    assert found.tokens == whole.tokens
    for name in ("hessian", "cross"):
        mine, expected = getattr(found, name).double(), getattr(whole, name).double()
        assert (mine - expected).norm() <= 1e-6 * whole.hessian.norm(), name
    assert torch.equal(found.diagonal, found.hessian.diagonal())


@pytest.mark.parametrize(("rows", "columns", "others"), [(1, 1, 1), (2, 16, 48), (33, 17, 65), (1025, 130, 49)])
def test_native_products_of_bf16(rows: int, columns: int, others: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, width, generator=generator).bfloat16() for width in (columns, others))
    start = torch.randn(columns, others, generator=generator)
    total = start.clone()
    if not add_gram(total, x, y):
        pytest.skip("this processor, or this build, has no products of bf16")
    expected = x.double().T @ y.double()
    assert (total.double() - start.double() - expected).norm() <= 2e-6 * (1 + rows**0.5) * (1 + expected.norm())
    half = torch.zeros(columns, columns)
    add_gram(half, x, x, upper=True)
    whole = torch.zeros(columns, columns)
    add_gram(whole, x, x)
    assert torch.equal(half.triu(), whole.triu())


def test_any_number_of_threads_gives_the_same_bytes(seed: int) -> None:
    x, y = (part.bfloat16() for part in inputs(300, 200, seed))
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            total = torch.zeros(200, 200)
            if not add_gram(total, x, y):
                pytest.skip("this processor, or this build, has no products of bf16")
            found.append(total)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(total, found[0]) for total in found)
