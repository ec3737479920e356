"""Layers with correlated inputs, and the textbook forms of what the solvers do, in float64 and without any trick."""

from __future__ import annotations

import torch

from bitstrata.solvers import Moments
from bitstrata.solvers.joint import JointSolver, Track
from bitstrata.solvers.metric import Metric, prepare


def correlated(columns, seed, tokens=None):
    """Inputs [tokens, K] with a decaying spectrum and a few hot channels."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 4 * columns
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) * torch.arange(1, columns + 1) ** -0.4
    x = x @ mix
    x[:, :: max(1, columns // 5)] *= 5
    return x


def moments_of(x, other=None):
    """Moments of quantized inputs x, and full-precision inputs `other`."""
    other = x if other is None else other
    return Moments.of(x.T @ x / len(x), other.T @ x / len(x), len(x))


def target_of(moments, weight, damping, correction):
    """W* [N, K] as solvers get it."""
    columns = torch.arange(weight.shape[1])
    _, targets = prepare(weight, moments, columns, [len(columns)], damping=damping, correction=correction)
    return torch.cat([target.T for target in targets])


def rows_of(count, columns, seed):
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(count, columns, generator=generator) * torch.rand(count, 1, generator=generator)


def solver_of(weight, hessian, bits, groups, growth=2.0, **options):
    """Unsolved: W [N, K] and one damped Hessian for all tracks."""
    metric = Metric.of(hessian, groups)
    tracks = [Track(b, growth ** (b - bits[0]), weight.T.contiguous(), metric) for b in bits]
    return JointSolver(tracks, groups, **options)


def loss(weight, decoded, hessian):
    """(w - q) H (w - q)^T of every row, float64."""
    error = (weight - decoded).double()
    return ((error @ hessian.double()) * error).sum(1)
