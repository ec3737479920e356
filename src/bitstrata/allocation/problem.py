"""The problem every solver gets: choose bits for each unit so that the loss is least and the bytes fit.

A unit is a layer, or several that must have equal bits. Every (unit, bits) is a choice, and all M
choices are numbered in one row; an allocation x is an integer array, the choice of each unit. Predicted:

    loss(x) = c + sum_u a[x_u] + sum_{u,w} Q[x_u, x_w]

with c, a, Q from the sketches (sensitivity.py). Bytes are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from ..errors import UsageError
from ..nn.fused import TOGETHER
from ..plans import ModelSizes
from .sensitivity import Sensitivity

Array = np.ndarray[Any, Any]
TrueLoss = Callable[[Mapping[str, int]], float]


@dataclass(frozen=True)
class Bounds:
    """The least and the most bits of the layers whose name matches a pattern (`*.down_proj`); later ones win."""

    least: Mapping[str, int]
    most: Mapping[str, int]

    def allowed(self, layer: str, supported: Sequence[int]) -> list[int]:
        """Of `supported` those within the bounds. Raises UsageError if none are."""
        low = [bits for pattern, bits in self.least.items() if fnmatchcase(layer, pattern)]
        high = [bits for pattern, bits in self.most.items() if fnmatchcase(layer, pattern)]
        found = [b for b in supported if (not low or b >= low[-1]) and (not high or b <= high[-1])]
        if not found:
            raise UsageError(
                f"no bits of layer {layer} lie between the bounds {low[-1] if low else 1} and "
                f"{high[-1] if high else 8}; it has {', '.join(map(str, supported))}"
            )
        return found

    def check(self, layers: Sequence[str]) -> None:
        """Raise UsageError for a pattern that matches no layer."""
        for pattern in (*self.least, *self.most):
            if not any(fnmatchcase(layer, pattern) for layer in layers):
                raise UsageError(f"the pattern {pattern!r} matches no layer", hint=f"layers are called {layers[0]}")


NO_BOUNDS = Bounds({}, {})


@dataclass(frozen=True)
class Problem:
    """What to choose from, what it costs, how much there is.

    units: the layers of each unit. Of each choice: `unit` it belongs to, its `bits`, its `bytes`: int64 [M], units
    and within them bits ascending.
    constant c, linear a [M], products Q [M, M]: the predicted loss above; Q is diagonal if only single layers were
    measured.
    limit: the most bytes. true_loss: measures a plan; for the solvers that ask.
    """

    units: Sequence[tuple[str, ...]]
    unit: Array
    bits: Array
    bytes: Array
    constant: float
    linear: Array
    products: Array
    limit: int
    true_loss: TrueLoss | None = None

    @classmethod
    def build(
        cls,
        sensitivity: Sensitivity,
        sizes: ModelSizes,
        limit: int,
        *,
        together: bool = False,
        bounds: Bounds = NO_BOUNDS,
        true_loss: TrueLoss | None = None,
    ) -> Problem:
        """The problem of a checkpoint. Raises UsageError if bounds and limit leave no plan."""
        units, choices = find_choices(sizes, limit, together=together, bounds=bounds)
        row = {key: number for number, key in enumerate(sensitivity.rows)}
        # which rows of the sensitivity a choice is made of, bool [M, rows]
        pairs = [(number, row[name, b]) for number, (index, b) in enumerate(choices) for name in units[index]]
        members = csr_array((np.ones(len(pairs)), tuple(zip(*pairs, strict=True))), (len(choices), len(row)))
        constant, linear, products = sensitivity.quadratic
        return cls(
            units=units,
            unit=np.array([index for index, _ in choices]),
            bits=np.array([bits for _, bits in choices]),
            bytes=np.array([sum(sizes.layers[name][bits] for name in units[index]) for index, bits in choices]),
            constant=constant,
            linear=members @ linear,
            products=members @ (members @ products).T,  # products are symmetric
            limit=limit,
            true_loss=true_loss,
        )

    @cached_property
    def lowest(self) -> Array:
        """Every unit at its lowest bits."""
        return np.searchsorted(self.unit, np.arange(len(self.units)))

    @cached_property
    def highest(self) -> Array:
        """Every unit at its highest bits."""
        return np.searchsorted(self.unit, np.arange(len(self.units)), side="right") - 1

    @cached_property
    def single(self) -> Array:
        """What each choice costs while all other layers are at the base; never less for fewer bits. float64 [M]."""
        cost: Array = np.maximum(self.linear + np.diag(self.products), 0)
        for first, last in zip(self.lowest, self.highest, strict=True):
            cost[first : last + 1] = np.maximum.accumulate(cost[first : last + 1][::-1])[::-1]
        return cost

    def size(self, x: Array) -> int:
        """Bytes of an allocation."""
        return int(self.bytes[x].sum())

    def loss(self, x: Array) -> float:
        """Predicted loss of an allocation, before the curve."""
        return self.constant + float(self.linear[x].sum() + self.products[np.ix_(x, x)].sum())

    def changes(self, x: Array, row: Array | None = None) -> tuple[Array, Array]:
        """What it does to the predicted loss and to the bytes to move each choice's unit to it alone, [M] each.

        `row`: Q summed over the columns x, for callers that keep it up to date.
        """
        own = x[self.unit]  # the choice that each one would replace
        row = self.products[:, x].sum(1) if row is None else row
        loss = self.linear - self.linear[own] + 2 * (row - row[own])
        return loss + self._pairs(own, np.arange(len(own)), np.arange(len(own))), self.bytes - self.bytes[own]

    def pair_changes(self, x: Array, choices: Array) -> Array:
        """The part of the change of two moves at once that neither has alone: [m, m] for m `choices`."""
        own = x[self.unit]
        return 2 * self._pairs(own, choices[:, None], choices[None, :])

    def _pairs(self, own: Array, i: Array, j: Array) -> Array:
        """Inner products of what moves i and j change."""
        q = self.products
        return q[i, j] - q[own[i], j] - q[i, own[j]] + q[own[i], own[j]]

    def plan(self, x: Array) -> dict[str, int]:
        """Layer -> bits."""
        return {name: int(self.bits[choice]) for layers, choice in zip(self.units, x, strict=True) for name in layers}

    def fill(self, x: Array) -> Array:
        """The allocation raised as far as bytes reach, always by the move that saves most for its bytes."""
        x = x.copy()
        while True:
            loss, size = self.changes(x)
            possible = (size > 0) & (size <= self.limit - self.size(x)) & (loss < 0)
            if not possible.any():
                return x
            best = int(np.where(possible, loss / np.maximum(size, 1), np.inf).argmin())
            x[self.unit[best]] = best


def find_choices(
    sizes: ModelSizes, limit: int, *, together: bool, bounds: Bounds
) -> tuple[list[tuple[str, ...]], list[tuple[int, int]]]:
    """The units, and every (unit, bits) that may be chosen. Raises UsageError if bounds and limit leave no plan."""
    bounds.check(list(sizes.layers))
    units: list[tuple[str, ...]] = [(name,) for name in sizes.layers]
    if together:
        units = fused_units(list(sizes.layers))
    choices: list[tuple[int, int]] = []
    least = 0
    for index, layers in enumerate(units):
        shared = set.intersection(*(set(bounds.allowed(name, list(sizes.layers[name]))) for name in layers))
        if not shared:
            raise UsageError(f"{', '.join(layers)} have no bits in common within the bounds")
        choices += [(index, bits) for bits in sorted(shared)]
        least += sum(sizes.layers[name][min(shared)] for name in layers)
    if least > limit:
        raise UsageError(
            f"within these bounds the planned layers need at least {least} bytes, {least - limit} more than "
            "the budget leaves them",
            hint="raise the budget or lower the least bits",
        )
    return units, choices


def fused_units(layers: Sequence[str]) -> list[tuple[str, ...]]:
    """`layers` with those that share a kernel call at equal bits (nn/fused.py) in one unit, in their order."""
    group = {name: index for index, names in enumerate(TOGETHER) for name in names}
    units: dict[tuple[str, int | str], list[str]] = {}
    for layer in layers:
        parent, _, name = layer.rpartition(".")
        units.setdefault((parent, group.get(name, name)), []).append(layer)
    return [tuple(members) for members in units.values()]


def random_allocation(problem: Problem, seed: int) -> Array:
    """Random units raised a step at a time until no step fits: what a plan has to beat."""
    generator, x = np.random.default_rng(seed), problem.lowest.copy()
    while True:
        following = np.minimum(x + 1, problem.highest)
        fits = problem.size(x) + problem.bytes[following] - problem.bytes[x] <= problem.limit
        possible = np.flatnonzero(fits & (following > x))
        if not len(possible):
            return x
        unit = generator.choice(possible)
        x[unit] = following[unit]
