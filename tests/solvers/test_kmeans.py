"""Nested k-means on a line: optimal by trying everything, nested, and no surprise in degenerate rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from randomness import examples

from bitstrata.solvers.kmeans import Floats, Ints, Points, kmeans, nested_kmeans, split

seeds = st.integers(0, 2**31 - 1)


def draw(seed: int, rows: int, columns: int) -> tuple[Floats, Floats]:
    """Values with ties in one case of three, weights over some powers of ten and a share of zeros."""
    generator = np.random.default_rng(seed)
    values = generator.standard_t(3, (rows, columns)).astype(np.float32).astype(np.float64)
    if seed % 3 == 0:
        values = values.round()
    weights = generator.lognormal(0, 3, (rows, columns))
    weights[generator.random((rows, columns)) < 0.2] = 0
    return values, weights


def counted(weights: Floats) -> Floats:
    """What a row's weights count: ones if there are none."""
    return weights if weights.any() else np.ones_like(weights)


def cost(values: Floats, weights: Floats) -> float:
    """The weighted sum of squares around the weighted mean."""
    if not weights.any():
        return 0.0
    mean = (weights * values).sum() / weights.sum()
    return float((weights * (values - mean) ** 2).sum())


def cheapest(values: Floats, weights: Floats, clusters: int) -> float:
    """The least cost of all ways to cut the sorted values, by trying all of them."""
    order = values.argsort()
    x, f = values[order], weights[order]
    cuts = itertools.combinations_with_replacement(range(len(x) + 1), clusters - 1)
    return min(
        sum(cost(x[low:high], f[low:high]) for low, high in itertools.pairwise((0, *cut, len(x)))) for cut in cuts
    )


def loss(values: Floats, weights: Floats, codes: Ints, table: Floats) -> float:
    return float((weights * (values - table[codes]) ** 2).sum())


def size_of(values: Floats, weights: Floats) -> float:
    """The scale that rounding errors of a row's costs are measured with."""
    return float((weights * values**2).sum()) + 1e-30


@examples(40)  # of three rows each
@given(seeds, st.integers(1, 9), st.integers(1, 3))
def test_the_seed_is_the_best_of_all(seed: int, columns: int, bits: int) -> None:
    values, weights = draw(seed, 3, columns)
    codes, tables = nested_kmeans(values, weights, (bits,), 8)
    for x, f, code, table in zip(values, map(counted, weights), codes, tables[bits], strict=True):
        found, best = loss(x, f, code, table), cheapest(x, f, 2**bits)
        assert found == pytest.approx(best, rel=1e-9, abs=1e-12 * size_of(x, f)), f"seed {seed}"


def lloyd(values: Floats, weights: Floats, clusters: int, generator: np.random.Generator) -> float:
    """The cost where Lloyd's iteration from random centres ends."""
    centres = np.sort(generator.choice(values, clusters, replace=False))
    for _ in range(50):
        label = np.abs(values[:, None] - centres).argmin(1)
        for cluster in range(clusters):
            mine = label == cluster
            if weights[mine].any():
                centres[cluster] = np.average(values[mine], weights=weights[mine])
    return float((weights * (values - centres[label]) ** 2).sum())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_no_run_of_lloyd_is_better(bits: int, seed: int) -> None:
    values, weights = draw(seed, 4, 300)
    generator = np.random.default_rng(seed)
    codes, tables = nested_kmeans(values, weights, (bits,), 8)
    for x, f, code, table in zip(values, weights, codes, tables[bits], strict=True):
        distinct = len(np.unique(x))
        runs = [lloyd(x, f, min(2**bits, distinct), generator) for _ in range(5)]
        assert loss(x, f, code, table) <= min(runs) * (1 + 1e-9), f"seed {seed}"


@given(seeds, st.integers(1, 12), st.integers(0, 2))
def test_a_split_is_the_best_of_all(seed: int, columns: int, bits: int) -> None:
    values, weights = draw(seed, 3, columns)
    points = Points.of(values, weights)
    borders = kmeans(points, 2**bits)
    halved = split(points, borders)
    assert np.array_equal(halved[:, ::2], borders), "the clusters that were split are still there"
    for x, f, before, after in zip(points.value, points.weight, borders, halved, strict=True):
        for cluster, (low, high) in enumerate(itertools.pairwise(before)):
            middle = after[2 * cluster + 1]
            assert low <= middle <= high
            found = cost(x[low:middle], f[low:middle]) + cost(x[middle:high], f[middle:high])
            best = min(cost(x[low:m], f[low:m]) + cost(x[m:high], f[m:high]) for m in range(low, high + 1))
            assert found == pytest.approx(best, rel=1e-9, abs=1e-12 * size_of(x, f)), f"seed {seed}"
            assert high - low < 2 or low < middle < high, f"a cluster was left whole (seed {seed})"


@given(seeds, st.integers(1, 40), st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
def test_more_bits_refine_fewer(seed: int, columns: int, lowest: int, more: int, kmeans_bits: int) -> None:
    values, weights = draw(seed, 3, columns)
    bits = tuple(range(lowest, lowest + more + 1))
    codes, tables = nested_kmeans(values, weights, bits, kmeans_bits)
    seed_bits = min(lowest, kmeans_bits)
    alone, centres = nested_kmeans(values, weights, (seed_bits,), 8)
    assert np.array_equal(codes >> (bits[-1] - seed_bits), alone), f"seed {seed}"
    if seed_bits == lowest:
        assert np.array_equal(tables[lowest], centres[lowest]), f"seed {seed}"
    for row, (x, f) in enumerate(zip(values, map(counted, weights), strict=True)):
        losses = []
        for p in bits:
            code, table = codes[row] >> (bits[-1] - p), tables[p][row]
            assert bool((np.diff(table) >= 0).all()), f"seed {seed}"
            assert bool((np.diff(code[x.argsort(kind="stable")].astype(int)) >= 0).all()), f"seed {seed}"
            losses.append(loss(x, f, code, table))
            for cluster in np.unique(code[f > 0]):
                mine = code == cluster
                mean = (f[mine] * x[mine]).sum() / f[mine].sum()
                assert table[cluster] == pytest.approx(mean, rel=1e-9, abs=1e-12), f"seed {seed}"
        slack = 1e-12 * size_of(x, f)
        assert all(fine <= coarse * (1 + 1e-9) + slack for coarse, fine in itertools.pairwise(losses)), f"seed {seed}"


@given(seeds, st.integers(1, 30))
def test_equal_values_share_a_code(seed: int, columns: int) -> None:
    values, weights = draw(3 * (seed // 3), 2, columns)
    codes, _ = nested_kmeans(values, weights, (1, 2, 3, 4, 5), 8)
    for x, code in zip(values, codes, strict=True):
        assert len(set(zip(x, code, strict=True))) == len(set(x)), f"seed {seed}"


def test_rows_do_not_see_each_other(seed: int) -> None:
    values, weights = draw(seed, 6, 50)
    values[2:4, 10:] = values[2:4, :1]  # fewer points than in the others
    codes, tables = nested_kmeans(values, weights, (2, 3, 4), 8)
    for row in range(6):
        mine, table = nested_kmeans(values[row : row + 1], weights[row : row + 1], (2, 3, 4), 8)
        assert np.array_equal(mine[0], codes[row]), f"seed {seed}"
        for p in (2, 3, 4):
            np.testing.assert_allclose(table[p][0], tables[p][row], rtol=1e-12, atol=1e-12)


def test_only_what_counts_decides_and_the_rest_goes_to_the_nearer_centre() -> None:
    values = np.array([[0.0, 1.0, 4.0, 5.0, 2.4, 2.6, -9.0, 9.0]])
    weights = np.array([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    codes, tables = nested_kmeans(values, weights, (1,), 8)
    assert tables[1].tolist() == [[0.5, 4.5]]
    assert codes.tolist() == [[0, 0, 1, 1, 0, 1, 0, 1]]


def test_a_row_without_weight_counts_every_value_once() -> None:
    values, _ = draw(1, 2, 20)
    codes, tables = nested_kmeans(values, np.stack([np.zeros(20), np.ones(20)]), (2, 3), 8)
    other, expected = nested_kmeans(values[:1], np.ones((1, 20)), (2, 3), 8)
    assert np.array_equal(codes[:1], other)
    assert all(np.array_equal(tables[p][:1], expected[p]) for p in (2, 3))


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_fewer_values_than_clusters_are_exact(bits: int) -> None:
    values = np.array([[3.0, -1.0, 3.0, 0.5, -1.0, 3.0]]) if bits > 1 else np.array([[3.0, -1.0, 3.0]])
    codes, tables = nested_kmeans(values, np.ones_like(values), tuple(range(1, bits + 1)), 8)
    assert np.array_equal(np.take_along_axis(tables[bits], codes.astype(int), 1), values)
    assert bool((np.diff(tables[bits]) >= 0).all())


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 1e-30, 65504.0])
def test_a_constant_row_is_that_constant_in_every_entry(value: float) -> None:
    _, tables = nested_kmeans(np.full((2, 7), value), np.ones((2, 7)), (1, 2, 5), 8)
    assert all(np.allclose(table, value, rtol=1e-15, atol=0) for table in tables.values())


def test_weights_of_any_size_and_range_give_centres_among_the_values() -> None:
    generator = np.random.default_rng(0)
    values = np.sort(generator.normal(size=(8, 200)), axis=1)
    for weights in (10.0 ** generator.uniform(-40, 0, (8, 200)), np.full((8, 200), 1e-45), np.full((8, 200), 1e30)):
        codes, tables = nested_kmeans(values, weights, (2, 3, 4, 5), 8)
        for p, table in tables.items():
            assert bool((np.diff(table) >= 0).all())
            for x, code, centres in zip(values, codes >> (5 - p), table, strict=True):
                for cluster in np.unique(code):
                    mine = x[code == cluster]
                    assert mine.min() - 1e-12 <= centres[cluster] <= mine.max() + 1e-12
