"""Sums over logits against the formulas in float64."""

from __future__ import annotations

import math

import numpy as np
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


def test_the_spread_is_that_of_the_tokens(seed: int) -> None:
    """As llama-perplexity prints it, by the formulas in float64 over sorted values."""
    generator = torch.Generator().manual_seed(seed)
    n, vocabulary = 1201, 17
    p, q = (3 * torch.randn(n, vocabulary, generator=generator) for _ in range(2))
    targets = torch.randint(0, vocabulary, (n,), generator=generator)
    log_p, log_q = p.double().log_softmax(1).numpy(), q.double().log_softmax(1).numpy()
    right_p, right_q = (log[range(n), targets.numpy()] for log in (log_p, log_q))
    kld = sorted((np.exp(log_p) * (log_p - log_q)).sum(1))
    same = (log_p.argmax(1) == log_q.argmax(1)).mean()
    found, base = measure(q, targets, p), measure(p, targets)
    spread = found.spread
    assert spread is not None

    def error(values: np.ndarray) -> float:  # mean_and_uncertainty: from the sums of values and of squares
        mean, square = values.sum() / n, (values**2).sum() / n
        return math.sqrt((square - mean**2) / (n - 1))

    def between(fraction: float) -> float:
        place = fraction * (n - 1)
        low = math.floor(place)
        return kld[low] + (place - low) * (kld[low + 1] - kld[low])

    assert spread.kld_error == pytest.approx(error(np.array(kld)), rel=1e-4)
    assert spread.kld_median == pytest.approx(kld[n // 2], rel=1e-4)
    assert spread.kld_p99 == pytest.approx(between(0.99), rel=1e-4)
    assert spread.kld_p999 == pytest.approx(between(0.999), rel=1e-4)
    assert spread.kld_max == pytest.approx(kld[-1], rel=1e-4)
    assert spread.top1_error == pytest.approx(math.sqrt(same * (1 - same) / (n - 1)), rel=1e-6)
    assert found.perplexity_error == pytest.approx(math.exp(-right_q.mean()) * error(right_q), rel=1e-4)
    assert spread.ln_ratio == pytest.approx(math.log(found.perplexity / base.perplexity), rel=1e-4)
    # of two dependent means, by their variances and covariance
    covariance = ((right_p * right_q).mean() - right_p.mean() * right_q.mean()) / (n - 1)
    expected = math.sqrt(error(right_p) ** 2 + error(right_q) ** 2 - 2 * covariance)
    assert spread.ln_ratio_error == pytest.approx(expected, rel=1e-4)
    squares = (np.exp(right_q) - np.exp(right_p)) ** 2
    assert spread.rms_dp == pytest.approx(math.sqrt(squares.mean()), rel=1e-4)
    assert spread.rms_dp_error == pytest.approx(0.5 / math.sqrt(squares.mean()) * error(squares), rel=1e-4)


def test_one_token_has_no_error_and_equal_models_no_spread(seed: int) -> None:
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(seed))
    one = measure(logits[:1], torch.tensor([2]), logits[1:2])
    assert one.spread is not None
    assert (one.perplexity_error, one.spread.kld_error, one.spread.rms_dp_error) == (None, None, None)
    assert one.spread.kld_median == one.spread.kld_max == one.kld
    same = measure(logits, torch.zeros(5, dtype=torch.int64), logits).spread
    assert same is not None
    assert (same.kld_max, same.kld_error, same.ln_ratio_error, same.rms_dp, same.rms_dp_error) == (0, 0, 0, 0, 0)


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
    assert found.spread is None


@pytest.mark.parametrize("spoiled", ["model", "reference"])
def test_nan_is_not_taken_for_a_distance_of_zero(spoiled: str) -> None:
    good, bad = torch.zeros(3, 4), torch.full((3, 4), torch.nan)
    q, p = (bad, good) if spoiled == "model" else (good, bad)
    found = measure(q, torch.tensor([0, 1, 2]), p)
    assert found.kld is not None
    assert math.isnan(found.kld)
    assert found.spread is not None
    assert math.isnan(found.spread.kld_p99)
    assert math.isnan(found.nll) == (spoiled == "model")


def test_a_perplexity_beyond_float_is_infinite() -> None:
    assert Metrics(1, 1e4, None, None).perplexity == math.inf
