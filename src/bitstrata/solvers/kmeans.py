"""Weighted k-means on a line, exact and nested: the codes of one weight row at every precision.

The points of a row are its distinct values, sorted, each with the sum of its weights; values of
weight 0 are no points. Clusters are intervals of points, so a clustering is a list of borders: a
border is the number of points below it. With prefix sums S0, S1, S2 of f, f x, f x^2 the cost of
the interval [j, i) takes constant time:

    cost(j, i) = S2[i] - S2[j] - (S1[i] - S1[j])^2 / (S0[i] - S0[j])

    k-means D_m[i] = min_{j <= i} D_{m-1}[j] + cost(j, i), the best cost of the first i points in m
            clusters. Its argmin grows with i and with m, so it is computed at the middle between
            two known ones, within their bounds: O(k n log n) for k clusters of n points
    split   every cluster at the border where the two parts cost least, of all borders in it

Both are optimal up to the rounding of float64. Equal costs go to the lowest border, so nothing
depends on chance, and equal values always share a code.

Rows are solved together, in arrays padded at the end by points of weight 0, which cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# The largest weight of a row is 1, and prefix sums cannot tell an interval of less than this from an empty one.
LEAST = 1e-15


@dataclass(frozen=True)
class Points:
    """The points of r rows, at most n in each.

    value: ascending, [r, n]; weight: at most 1, [r, n]; count: points in each row, [r].
    middle: what was subtracted from the values of each row so that prefix sums keep their digits, [r, 1].
    s0, s1, s2: prefix sums, [r, n + 1].
    """

    value: Floats
    weight: Floats
    count: Ints
    middle: Floats
    s0: Floats
    s1: Floats
    s2: Floats

    @classmethod
    def of(cls, values: Floats, weights: Floats) -> Points:
        """The points of rows [r, K]; weights must not be negative. A row without any weight counts each value once."""
        weights = np.where(weights.sum(1, keepdims=True) > 0, weights, 1.0)
        order = values.argsort(1, kind="stable")
        values, weights = np.take_along_axis(values, order, 1), np.take_along_axis(weights, order, 1)
        weighted = weights > 0
        row, x, f = np.nonzero(weighted)[0], values[weighted], weights[weighted]
        fresh = np.ones(len(x), dtype=bool)
        fresh[1:] = (x[1:] != x[:-1]) | (row[1:] != row[:-1])
        first = np.flatnonzero(fresh)
        row, x, f = row[first], x[first], np.add.reduceat(f, first)
        count = np.bincount(row, minlength=len(values))
        place = np.arange(len(x)) - (np.cumsum(count) - count)[row]
        value, weight = np.zeros((2, len(values), int(count.max())))
        value[row, place], weight[row, place] = x, f
        weight /= weight.max(1, keepdims=True)
        middle = (value[:, :1] + np.take_along_axis(value, count[:, None] - 1, 1)) / 2
        value -= middle
        sums = (_prefix(weight * value**power) for power in range(3))
        return cls(value, weight, count, middle, *sums)

    def means(self, borders: Ints) -> Floats:
        """Weighted mean of each cluster, NaN where it is empty: borders [r, k + 1] -> [r, k]."""
        filled = np.diff(borders) > 0
        start = (borders[:, :-1] + np.arange(len(borders))[:, None] * self.value.shape[1])[filled]
        # sums of the cluster alone: differences of prefix sums would leave a light cluster few digits
        moment, total = (np.add.reduceat(part.ravel(), start) for part in (self.weight * self.value, self.weight))
        result = np.full(filled.shape, np.nan)
        result[filled] = moment / total
        return result


def _prefix(values: Floats) -> Floats:
    result = np.zeros((values.shape[0], values.shape[1] + 1))
    np.cumsum(values, axis=1, out=result[:, 1:])
    return result


def kmeans(points: Points, clusters: int) -> Ints:
    """Borders [r, clusters + 1] of the clusters of least total cost; some are empty if points are few."""
    rows, size = points.value.shape
    cost = points.s2 - points.s1**2 / np.maximum(points.s0, LEAST)
    argmins = [np.zeros((rows, size + 1), dtype=np.int64)]
    for count in range(2, clusters + 1):
        argmin, cost = _one_more(points, cost, argmins[-1], only_all=count == clusters)
        argmins.append(argmin)
    borders = np.zeros((rows, clusters + 1), dtype=np.int64)
    borders[:, -1] = size
    for cluster in range(clusters - 1, 0, -1):
        borders[:, cluster] = np.take_along_axis(argmins[cluster], borders[:, cluster + 1, None], 1)[:, 0]
    return np.minimum(borders, points.count[:, None])


def _one_more(points: Points, cost: Floats, below: Ints, *, only_all: bool) -> tuple[Ints, Floats]:
    """From the least costs of m clusters to those of m + 1: where the last cluster begins, and the costs.

    Args:
        cost: of the first i points, [r, n + 1]; below: the same argmin for m clusters, a lower bound.
        only_all: only for all points, i = n; the rest is left at 0.
    """
    rows, size = points.value.shape
    origin = np.arange(rows)[:, None] * (size + 1)  # where a row begins in flattened prefix sums
    head = (cost - points.s2).ravel()
    argmin, least = np.zeros_like(below), np.zeros_like(cost)

    def solve(ends: Ints, low: Ints, high: Ints) -> None:
        low = np.maximum(low, below[:, ends])
        high = np.maximum(np.minimum(high, ends), low)
        where, found = _minima(points, head, *((origin + part).ravel() for part in (ends, low, high)))
        argmin[:, ends] = where.reshape(rows, -1) - origin
        least[:, ends] = found.reshape(rows, -1)

    solve(np.array([size]), np.zeros((rows, 1), np.int64), np.full((rows, 1), size))
    stride = 0 if only_all else 1 << (size.bit_length() - 1)
    while stride:
        ends = np.arange(stride, size, 2 * stride)
        if len(ends):
            solve(ends, argmin[:, ends - stride], argmin[:, np.minimum(ends + stride, size)])
        stride //= 2
    return argmin, least


def _minima(points: Points, head: Floats, end: Ints, low: Ints, high: Ints) -> tuple[Ints, Floats]:
    """For each entry: the first j in low..high with the least head[j] + S2[j] + cost(j, end), and that minimum."""
    s0, s1, s2 = points.s0.ravel(), points.s1.ravel(), points.s2.ravel()
    length = high - low + 1
    start = np.cumsum(length) - length
    j = np.arange(int(length.sum())) + np.repeat(low - start, length)
    weight = np.repeat(s0[end], length)
    weight -= s0.take(j)
    np.maximum(weight, LEAST, out=weight)
    moment = np.repeat(s1[end], length)
    moment -= s1.take(j)
    moment *= moment
    moment /= weight
    value = head.take(j)
    value -= moment
    least = np.minimum.reduceat(value, start)
    hits = np.flatnonzero(value == np.repeat(least, length))
    return j[hits[np.searchsorted(hits, start)]], least + s2[end]


def split(points: Points, borders: Ints) -> Ints:
    """Every cluster in two: borders [r, k + 1] -> [r, 2 k + 1].

    A cluster of a single point goes into the lower part whole.
    """
    size = points.value.shape[1]
    result = _with_ends(borders)
    begin, end = borders[:, :-1], borders[:, 1:]
    filled = np.diff(borders) > 0
    length = (end - begin)[filled]
    row = np.nonzero(filled)[0]
    start = np.cumsum(length) - length
    offset = row * (size + 1)
    first, last = np.repeat(begin[filled] + offset, length), np.repeat(end[filled] + offset, length)
    j = np.arange(int(length.sum())) - np.repeat(start, length) + first
    gain = np.zeros(len(j))
    for low, high in ((first, j), (j, last)):
        weight = np.maximum(points.s0.take(high) - points.s0.take(low), LEAST)
        gain += (points.s1.take(high) - points.s1.take(low)) ** 2 / weight
    gain[start] = -1.0  # a border at the beginning separates nothing
    hits = np.flatnonzero(gain == np.repeat(np.maximum.reduceat(gain, start), length))
    best = j[hits[np.searchsorted(hits, start)]] - offset
    result[:, 1::2][filled] = np.where(length > 1, best, end[filled])
    return result


def _with_ends(borders: NDArray[Any]) -> NDArray[Any]:
    """Between any two borders the upper one once more: [r, k + 1] -> [r, 2 k + 1]."""
    return np.repeat(borders, 2, axis=1)[:, 1:]


def nested_kmeans(
    values: Floats, weights: Floats, bits: tuple[int, ...], kmeans_bits: int
) -> tuple[NDArray[np.uint8], dict[int, Floats]]:
    """Codes at the highest bits and a table of centres at every bits, each row on its own.

    Exact k-means at the lowest of `bits`, but at `kmeans_bits` at most; each further bit splits
    every cluster in two, so the code at p bits is the first p bits of the code. Codes grow with the
    value.

    Args:
        values, weights: float64 [r, K].

    Returns:
        codes uint8 [r, K], and bits -> centres [r, 2^bits], ascending.
    """
    points = Points.of(values, weights)
    at = min(kmeans_bits, bits[0])
    borders = kmeans(points, 2**at)
    centres = _neighbours(points.means(borders))
    thresholds = _thresholds(points, borders, centres)
    tables = {at: centres}
    for value in range(at + 1, bits[-1] + 1):
        before, borders = borders, split(points, borders)
        means = points.means(borders)
        centres = np.where(np.isnan(means), centres.repeat(2, axis=1), means)
        tables[value] = centres
        # an old border keeps its threshold, or a plane would depend on those after it
        fresh = borders != _with_ends(before)
        thresholds = np.where(fresh, _thresholds(points, borders, centres), _with_ends(thresholds))
    inner = torch.from_numpy(thresholds[:, 1:-1].copy())
    codes = torch.searchsorted(inner, torch.from_numpy(values - points.middle), right=True).to(torch.uint8)
    return codes.numpy(), {value: tables[value] + points.middle for value in bits}


def _neighbours(means: Floats) -> Floats:
    """Empty clusters (NaN) take the centre of the next filled one above, or else below."""
    position = np.arange(means.shape[1])
    above = np.where(np.isnan(means), means.shape[1], position)
    above = np.minimum.accumulate(above[:, ::-1], axis=1)[:, ::-1]
    highest = np.where(np.isnan(means), 0, position).max(1, keepdims=True)
    return np.take_along_axis(means, np.minimum(above, highest), 1)


def _thresholds(points: Points, borders: Ints, centres: Floats) -> Floats:
    """For each border the least value above it: what has weight 0 goes to the nearer of the two centres around it."""
    below, above = np.maximum(borders - 1, 0), np.minimum(borders, points.count[:, None] - 1)  # points around a border
    x_below, x_above = (np.take_along_axis(points.value, point, 1) for point in (below, above))
    centre = np.repeat(centres.ravel(), np.diff(borders).ravel())  # of every point, the rows without their padding
    origin = (np.cumsum(points.count) - points.count)[:, None]
    middle = (centre[origin + below] + centre[origin + above]) / 2
    threshold = np.clip(middle, np.nextafter(x_below, np.inf), x_above)
    return np.where(borders == 0, -np.inf, np.where(borders == points.count[:, None], np.inf, threshold))
