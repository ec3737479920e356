"""Binary-coded quantization (BCQ): w ~ z + sum_i a_i B_i by alternating minimisation.

Per group of g weights, with diagonal weights d >= 0 (here 1 on real columns, 0 on padding):

    greedy   r = w - z;  B_i = sgn(r), a_i = mean_d |r|, r -= a_i B_i                     (algorithm 2.1)
    round    (i)  a, z   = argmin sum_k d_k (w_k - z - sum_i a_i B_ik)^2                  (algorithm 2.3)
             (ii) a_i    = |a_i|, sorted descending: the level set does not change
             (iii) B     = the code of the nearest level; a weight on a midpoint goes up

No half-step increases the objective. The last step is a fit (i), so the scales returned are optimal
for the codes returned. Sources: Xu et al. 2018 (alternating multi-bit quantization); Kwon et al.
2021; the AnyBCQ paper, arXiv 2510.10467, section 3.1.

What the numbers need (each has a test):
  * sgn(0) = +1: `torch.sign` gives 0, which has no bit.
  * The normal matrix is singular when planes coincide or a group is constant. The fit solves for
    the *change* from the current coefficients with a ridge relative to the matrix, so a direction
    that the data does not determine keeps its value, whatever the size of the weights.
  * |a| and sorting are legal only because the codes are assigned anew right after.

Shapes: groups R = N J; w, d fp32 [R, g]; planes float +-1 [P, R, g]; scales [P, R]; offset [R].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..planes.weights import PlaneWeight
from .grouping import Grouping, affine_weight, code_signs, row_chunks, to_scale
from .method import Method

Solution = tuple[Tensor, Tensor, Tensor]  # planes, scale, offset
RIDGE = 1e-9  # relative to the mean diagonal of the normal matrix, which is solved in float64


def sgn(x: Tensor) -> Tensor:
    """+1 where x >= 0, else -1, in x's dtype; never 0."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def combine(planes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """z + sum_i a_i B_i: [P, R, g], [P, R], [R] -> [R, g]."""
    total = offset.unsqueeze(1).expand(planes.shape[1:]).clone()
    for plane, factor in zip(planes, scale, strict=True):
        total.addcmul_(plane, factor.unsqueeze(1))
    return total


def objective(w: Tensor, d: Tensor, planes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """sum_k d_k (w_k - q_k)^2 of each group: [R]."""
    return (d * (w - combine(planes, scale, offset)).square()).sum(1)


def fit_scales(
    w: Tensor, d: Tensor, planes: Tensor, scale: Tensor, offset: Tensor, *, asymmetric: bool = True
) -> tuple[Tensor, Tensor]:
    """Weighted least squares for scales (and offset, if `asymmetric`) with the planes fixed.

    `scale` and `offset` are the current values; a direction that the planes leave undetermined
    keeps them. Returns the new (scale, offset). Never increases the objective.
    """
    columns = [*planes, torch.ones_like(w)] if asymmetric else list(planes)
    basis = torch.stack(columns, dim=1)  # [R, m, g]
    weighted = basis * d.unsqueeze(1)
    normal = (weighted @ basis.transpose(1, 2)).double()  # [R, m, m]; whole numbers, exact, when d is 0 or 1
    residual = w - combine(planes, scale, offset)
    # summed in float64: a direction without data must get exactly 0, or the tiny ridge blows it up
    right = (weighted * residual.unsqueeze(1)).sum(2, dtype=torch.float64)  # [R, m]
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += (RIDGE * diagonal.mean(1, keepdim=True)).clamp_min(1e-300)
    change = torch.linalg.solve(normal, right).to(w.dtype)
    count = len(planes)
    return scale + change[:, :count].T, offset + change[:, count] if asymmetric else offset


def assign(w: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """The code of the nearest level for every weight: planes +-1 [P, R, g]."""
    signs = code_signs(len(scale), w.device).to(w.dtype)  # [P, 2^P]
    levels = offset.unsqueeze(1) + scale.T @ signs  # [R, 2^P]
    levels, order = levels.sort(dim=1, stable=True)
    middles = (levels[:, 1:] + levels[:, :-1]) / 2
    # right=True: on a midpoint the count includes it, so the upper level is taken
    position = torch.searchsorted(middles.contiguous(), w.contiguous(), right=True)
    code = order.gather(1, position)  # [R, g]
    return torch.stack([plane[code] for plane in signs])


def greedy(w: Tensor, d: Tensor, count: int, *, asymmetric: bool = True) -> Solution:
    """Planes [count, R, g], scales [count, R] and offset [R] one after the other."""
    total = d.sum(1).clamp_min(1e-30)
    offset = (d * w).sum(1) / total if asymmetric else torch.zeros_like(total)
    rest = w - offset.unsqueeze(1)
    planes, scales = [], []
    for _ in range(count):
        plane = sgn(rest)
        scale = (d * rest.abs()).sum(1) / total
        rest = rest - scale.unsqueeze(1) * plane
        planes.append(plane)
        scales.append(scale)
    return torch.stack(planes), torch.stack(scales), offset


def alternate(w: Tensor, d: Tensor, start: Solution, rounds: int, *, asymmetric: bool = True) -> Solution:
    """`rounds` alternations from `start`, and a last fit."""
    planes, scale, offset = start
    for _ in range(rounds):
        scale, offset = fit_scales(w, d, planes, scale, offset, asymmetric=asymmetric)
        scale = scale.abs().sort(dim=0, descending=True).values
        planes = assign(w, scale, offset)
    scale, offset = fit_scales(w, d, planes, scale, offset, asymmetric=asymmetric)
    return planes, scale, offset


def expand(w: Tensor, d: Tensor, start: Solution, rounds: int, *, asymmetric: bool = True) -> Solution:
    """One more plane, the given ones frozen (AnyBCQ, section 3.2; algorithm 3.2).

    Starts at the given scales with 0 for the new plane, that is, at the lower bits' own weight, and
    alternates new plane = sgn(residual without it) with a fit of all scales. The offset is fitted
    with them; the published code keeps the base's. The order of the frozen planes is their storage
    order, so nothing is sorted; a negative new scale is flipped together with its plane.
    """
    planes, scale, offset = start
    scale = torch.cat([scale, torch.zeros_like(scale[:1])])
    planes = torch.cat([planes, torch.ones_like(planes[:1])])
    for _ in range(rounds):
        rest = w - combine(planes[:-1], scale[:-1], offset)
        planes[-1] = sgn(rest)
        # the plane just changed: put its scale where the objective cannot exceed that of scale 0
        scale[-1] = (d * rest.abs()).sum(1) / d.sum(1).clamp_min(1e-30)
        scale, offset = fit_scales(w, d, planes, scale, offset, asymmetric=asymmetric)
        negative = scale[-1] < 0
        planes[-1] = torch.where(negative.unsqueeze(1), -planes[-1], planes[-1])
        scale[-1] = scale[-1].abs()
    return planes, scale, offset


def with_fallback(w: Tensor, d: Tensor, planes: Tensor, coefficients: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Round all coefficients as they are stored, and make the error of each group monotone in bits.

    Where rounding leaves a group worse at p bits than at the bits before, it takes over their
    coefficients with 0 for the new planes: the same weight, so the error cannot rise. In place.
    """
    before: tuple[Tensor, Tensor, Tensor] | None = None
    for bits in sorted(coefficients):
        scale, offset = (to_scale(value).float() for value in coefficients[bits])
        error = objective(w, d, planes[:bits], scale, offset)
        if before is not None:
            old_scale, old_offset, old_error = before
            worse = error > old_error
            padded = torch.cat([old_scale, torch.zeros_like(scale[len(old_scale) :])])
            scale = torch.where(worse, padded, scale)
            offset = torch.where(worse, old_offset, offset)
            error = torch.where(worse, old_error, error)
        coefficients[bits] = scale, offset
        before = scale, offset, error


@dataclass(frozen=True)
class BCQ(Method):
    """Alternating BCQ at the lowest bits, then one frozen-prefix expansion for each further plane.

    With a single bits value this is plain dedicated BCQ. With several it makes AnyBCQ's planes
    before any training, in weight space, from no data.

    rounds: alternations; asymmetric: fit an offset a group.
    """

    rounds: int = 20
    asymmetric: bool = True

    name = "bcq"

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")

    def solve_rows(self, weight: Tensor, bits: tuple[int, ...], group_size: int) -> PlaneWeight:
        grouping = Grouping.of(weight, group_size)
        w, d = grouping.split(weight), grouping.mask(weight.device)
        found = base(w, d, bits[0], self.rounds, asymmetric=self.asymmetric)
        coefficients = {bits[0]: found[1:]}
        for count in range(bits[0] + 1, bits[-1] + 1):
            found = grow(w, d, found, self.rounds, asymmetric=self.asymmetric)
            if count in bits:
                coefficients[count] = found[1:]
        with_fallback(w, d, found[0], coefficients)
        return affine_weight(grouping, found[0] > 0, coefficients)


def base(w: Tensor, d: Tensor, count: int, rounds: int, *, asymmetric: bool = True) -> Solution:
    """`count` planes for each group by `rounds` alternations after a greedy start, in chunks of groups."""
    parts = []
    for rows in row_chunks(len(w), w.shape[1] * (count + 1) * 4):
        start = greedy(w[rows], d[rows], count, asymmetric=asymmetric)
        parts.append(alternate(w[rows], d[rows], start, rounds, asymmetric=asymmetric))
    return _joined(parts)


def grow(w: Tensor, d: Tensor, start: Solution, rounds: int, *, asymmetric: bool = True) -> Solution:
    """`expand` in chunks of groups."""
    planes, scale, offset = start
    parts = []
    for rows in row_chunks(len(w), w.shape[1] * (len(scale) + 2) * 4):
        part = planes[:, rows], scale[:, rows], offset[rows]
        parts.append(expand(w[rows], d[rows], part, rounds, asymmetric=asymmetric))
    return _joined(parts)


def _joined(parts: Sequence[Solution]) -> Solution:
    planes, scales, offsets = zip(*parts, strict=True)
    return torch.cat(planes, 1), torch.cat(scales, 1), torch.cat(offsets)
