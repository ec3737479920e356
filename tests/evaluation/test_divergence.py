"""Sums over logits against the formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitstrata.metrics import Metrics, Tally


@given(st.integers(0, 2**31 - 1), st.integers(1, 30), st.integers(2, 50), st.sampled_from([0.1, 1.0, 10.0, 300.0]))
def test_measures_are_those_of_the_formulas(seed: int, tokens: int, vocabulary: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (size * torch.randn(tokens, vocabulary, generator=generator) for _ in range(2))
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    log_p, log_q = p.double().log_softmax(1), q.double().log_softmax(1)
    found = measure(q, targets, p)
    assert found.tokens == tokens
    assert found.nll == pytest.approx(float(-log_q[range(tokens), targets].mean()), rel=1e-5, abs=1e-5 * size)
    assert found.kld == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(1).mean()), rel=1e-4, abs=1e-5 * size)
    assert found.top1_agreement == float((p.argmax(1) == q.argmax(1)).double().mean())


def measure(logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None = None) -> Metrics:
    tally = Tally()
    tally.add(logits, targets, reference)
    return tally.result()


def test_stretches_add_up(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(20, 9, generator=generator) for _ in range(2))
    targets = torch.randint(0, 9, (20,), generator=generator)
    tally = Tally()
    for rows in (slice(0, 3), slice(3, 4), slice(4, 20)):
        tally.add(q[rows], targets[rows], p[rows])
    found, whole = tally.result(), measure(q, targets, p)
    assert (found.tokens, found.top1_agreement) == (whole.tokens, whole.top1_agreement)
    assert found.nll == pytest.approx(whole.nll)
    assert found.kld == pytest.approx(whole.kld)


def test_a_model_is_at_no_distance_from_itself(seed: int) -> None:
    logits = 20 * torch.randn(40, 33, generator=torch.Generator().manual_seed(seed))
    found = measure(logits, torch.zeros(40, dtype=torch.int64), logits)
    assert found.kld == 0
    assert found.top1_agreement == 1


def test_known_values() -> None:
    """Two tokens, p = (3/4, 1/4) against q = (1/2, 1/2), and the second token comes."""
    p = torch.tensor([[3.0, 1.0]]).log()
    found = measure(torch.zeros(1, 2), torch.tensor([1]), p)
    assert found.nll == pytest.approx(math.log(2))
    assert found.perplexity == pytest.approx(2)
    assert found.kld == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert measure(p, torch.tensor([1])).nll == pytest.approx(math.log(4))


def test_without_a_reference_there_is_no_distance() -> None:
    found = measure(torch.zeros(1, 2), torch.tensor([1]))
    assert found.kld is None
    assert found.top1_agreement is None


@pytest.mark.parametrize("spoiled", ["model", "reference"])
def test_nan_is_not_taken_for_a_distance_of_zero(spoiled: str) -> None:
    good, bad = torch.zeros(3, 4), torch.full((3, 4), torch.nan)
    q, p = (bad, good) if spoiled == "model" else (good, bad)
    found = measure(q, torch.tensor([0, 1, 2]), p)
    assert found.kld is not None
    assert math.isnan(found.kld)
    assert math.isnan(found.nll) == (spoiled == "model")


def test_a_perplexity_beyond_float_is_infinite() -> None:
    assert Metrics(1, 1e4, None, None).perplexity == math.inf
