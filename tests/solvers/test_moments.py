"""Second moments: the target they ask for, and damping."""

from __future__ import annotations

import pytest
import torch
from moments_helpers import correlated, moments_of, rows_of, target_of


def test_the_target_is_the_least_squares_answer_to_quantized_inputs(seed):
    x = torch.randn(400, 20, generator=torch.Generator().manual_seed(seed + 2))
    original = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    weight = rows_of(6, 20, seed)
    found = target_of(moments_of(x, original), weight, 1e-9, 1.0)
    expected = torch.linalg.lstsq(x.double(), original.double() @ weight.double().T).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    half = target_of(moments_of(x, original), weight, 1e-9, 0.5)
    torch.testing.assert_close(half, (weight + found) / 2, rtol=1e-4, atol=1e-5)


def test_where_the_chains_agree_the_target_is_the_weight(seed):
    weight, found = rows_of(6, 20, seed), moments_of(correlated(20, seed))
    assert torch.equal(target_of(found, weight, 0.01, 1.0), weight)
    assert torch.equal(target_of(found, weight, 0.01, 0.0), weight)


@pytest.mark.parametrize("inputs", ["few tokens", "dead channels", "nothing"])
def test_rank_deficient_moments_are_damped(inputs, seed):
    x = correlated(20, seed, tokens=5 if inputs == "few tokens" else 100)
    if inputs == "dead channels":
        x[:, [0, 7]] = 0
    if inputs == "nothing":
        x[:] = 0
    found = moments_of(x, x * 1.1)
    torch.linalg.cholesky(found.damped(0.01))
    target = target_of(found, rows_of(4, 20, seed), 0.01, 1.0)
    assert target.isfinite().all()
    assert target.abs().max() < 10
