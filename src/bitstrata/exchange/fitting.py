"""Levels on a grid for values that are on none, or on one that is given: spacings are tried, then least squares.

    affine      x = low + step q,     0 <= q <= top
    symmetric   x = step c,           least <= c <= most

Each row is fitted for itself. Among the candidates the one with the smallest squared error is kept. Spacings of
whole parts of a row's range are among them, so values that are on a grid are found to be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

SHRINK = (0.96, 0.91, 0.86, 0.8, 0.7)  # of a range: what lies outside is clipped
TINY = 1e-30


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > TINY, above / below.clamp_min(TINY), 0.0)


def _best(candidates: Iterable[tuple[Tensor, ...]], error_of: Callable[..., Tensor], count: int) -> tuple[Tensor, ...]:
    """Row by row the candidate of the smallest error; each is a tuple of `count` tensors [n]."""
    kept: tuple[Tensor, ...] | None = None
    least: Tensor | None = None
    for candidate in candidates:
        error = error_of(*candidate)
        if kept is None or least is None:
            kept, least = candidate, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        kept = tuple(torch.where(better, new, old) for new, old in zip(candidate, kept, strict=True))
    if kept is None:
        raise ValueError(f"no candidates for {count} numbers a row")
    return kept


def affine_codes(x: Tensor, step: Tensor, low: Tensor, top: int) -> Tensor:
    """The nearest levels: fp32 [n, s] of whole numbers from 0 to top."""
    scaled = _ratio(x - low.unsqueeze(1), step.unsqueeze(1).expand_as(x))
    return scaled.round_().clamp_(0, top)


def fit_affine(
    x: Tensor, top: int, given: Iterable[tuple[Tensor, Tensor]] = (), *, below_zero: bool = False
) -> tuple[Tensor, Tensor]:
    """step >= 0 and low for the rows of x [n, s], each fp32 [n].

    given: steps and lows to try too. below_zero: low must not be positive.
    """
    least, most = x.amin(1), x.amax(1)
    if below_zero:
        least = least.clamp_max(0)
    middle, width = (least + most) / 2, most - least

    def refined(step: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        q = affine_codes(x, step, low, top)
        mean_q, mean_x = q.mean(1, keepdim=True), x.mean(1, keepdim=True)
        centred = q - mean_q
        better = _ratio(((x - mean_x) * centred).sum(1), centred.square().sum(1)).clamp_min(0)
        start = mean_x[:, 0] - better * mean_q[:, 0]
        if below_zero:
            start = start.clamp_max(0)
            better = _ratio(((x - start.unsqueeze(1)) * q).sum(1), q.square().sum(1)).clamp_min(0)
        return better, start

    def candidates() -> Iterable[tuple[Tensor, Tensor]]:
        for step, low in given:
            yield step, low.clamp_max(0) if below_zero else low
        for parts in range(top, max(0, top - 8), -1):
            yield width / parts, least
        yield refined(width / top, least)
        for share in SHRINK:
            yield refined(*refined(width * (share / top), middle - width * (share / 2)))

    def error(step: Tensor, low: Tensor) -> Tensor:
        q = affine_codes(x, step, low, top)
        return (x - low.unsqueeze(1) - step.unsqueeze(1) * q).square_().sum(1)

    step, low = _best(candidates(), error, 2)
    return step, low


def symmetric_codes(x: Tensor, step: Tensor, least: int, most: int) -> Tensor:
    """The nearest multiples of a step of either sign: fp32 [n, s] of whole numbers from least to most."""
    step = step.unsqueeze(1).expand_as(x)
    return (
        torch.where(step.abs() > TINY, x / torch.where(step.abs() > TINY, step, 1.0), 0.0).round_().clamp_(least, most)
    )


def fit_symmetric(x: Tensor, least: int, most: int, given: Iterable[Tensor] = ()) -> Tensor:
    """A step of either sign for the rows of x [n, s]: fp32 [n]."""
    at = x.abs().argmax(1, keepdim=True)
    largest = x.gather(1, at)[:, 0]

    def refined(step: Tensor) -> Tensor:
        c = symmetric_codes(x, step, least, most)
        return _ratio((x * c).sum(1), c.square().sum(1))

    def candidates() -> Iterable[tuple[Tensor]]:
        for step in given:
            yield (step,)
        for reach in (least, most):
            if reach:
                yield (largest / reach,)
                yield (refined(largest / reach),)
                for share in SHRINK[:2] if most > 20 else SHRINK:
                    yield (refined(largest * (share / reach)),)

    def error(step: Tensor) -> Tensor:
        c = symmetric_codes(x, step, least, most)
        return (x - step.unsqueeze(1) * c).square_().sum(1)

    return _best(candidates(), error, 1)[0]


def zero_point_codes(x: Tensor, step: Tensor, zero: Tensor, top: int) -> Tensor:
    """The nearest levels of step (q - zero): fp32 [n, s] of whole numbers from 0 to top."""
    scaled = _ratio(x, step.unsqueeze(1).expand_as(x))
    return scaled.add_(zero.unsqueeze(1)).round_().clamp_(0, top)


def fit_zero_point(x: Tensor, top: int, given: Iterable[tuple[Tensor, Tensor]] = ()) -> tuple[Tensor, Tensor]:
    """step > 0, in fp16, and a whole zero from 1 to top, of x = step (q - zero): fp32 [n] each.

    given: steps and lows to try too.
    """

    def rounded(step: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        return step.half().float(), _ratio(-low, step).round_().clamp_(1, top)

    def refined(step: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        c = zero_point_codes(x, step, zero, top) - zero.unsqueeze(1)
        return _ratio((x * c).sum(1), c.square().sum(1)).clamp_min(0).half().float(), zero

    def candidates() -> Iterable[tuple[Tensor, Tensor]]:
        for step, low in given:
            yield rounded(step, low)
        free = rounded(*fit_affine(x, top))
        for shift in (-1, 0, 1):
            start = free[0], (free[1] + shift).clamp(1, top)
            for share in (1.0, 1.04, 1.09):  # a zero that moved leaves a level unused
                yield refined(*refined(start[0] * share, start[1]))

    def error(step: Tensor, zero: Tensor) -> Tensor:
        c = zero_point_codes(x, step, zero, top) - zero.unsqueeze(1)
        return (x - step.unsqueeze(1) * c).square_().sum(1)

    step, zero = _best(candidates(), error, 2)
    return step, zero


def nearest_in(x: Tensor, step: Tensor, table: Tensor) -> Tensor:
    """For each x the index of the entry of an ascending table, times step, that is nearest: int64 [n, s]."""
    step = step.unsqueeze(1).expand_as(x)
    scaled = torch.where(step.abs() > TINY, x / torch.where(step.abs() > TINY, step, 1.0), 0.0)
    return torch.bucketize(scaled, (table[1:] + table[:-1]) / 2)


def fit_table(x: Tensor, table: Tensor) -> Tensor:
    """A step of either sign, so that x [n, s] is near step times entries of `table`: fp32 [n]."""
    largest = x.gather(1, x.abs().argmax(1, keepdim=True))[:, 0]

    def refined(step: Tensor) -> Tensor:
        entries = table[nearest_in(x, step, table)]
        return _ratio((x * entries).sum(1), entries.square().sum(1))

    def candidates() -> Iterable[tuple[Tensor]]:
        for reach in (float(table[0]), float(table[-1])):
            for share in (1.0, *SHRINK):
                yield (refined(largest * (share / reach)),)

    def error(step: Tensor) -> Tensor:
        return (x - step.unsqueeze(1) * table[nearest_in(x, step, table)]).square_().sum(1)

    return _best(candidates(), error, 1)[0]


def whole_multiples(parts: Tensor, top: int, weight: Tensor, tried: int) -> tuple[Tensor, Tensor]:
    """A unit, in fp16, of which the non-negative `parts` [n, S] are nearly multiples: fp32 [n], and these, up to top.

    The largest part is tried as top, top - 1, ... multiples. weight [n, S] is of squared errors.
    """
    largest = parts.amax(1)

    def multiples(unit: Tensor) -> Tensor:
        return _ratio(parts, unit.unsqueeze(1).expand_as(parts)).round_().clamp_(0, top)

    def candidates() -> Iterable[tuple[Tensor]]:
        for count in range(top, max(0, top - tried), -1):
            yield ((largest / count).half().float(),)

    def error(unit: Tensor) -> Tensor:
        return ((parts - unit.unsqueeze(1) * multiples(unit)).square_() * weight).sum(1)

    unit = _best(candidates(), error, 1)[0]
    return unit, multiples(unit)
