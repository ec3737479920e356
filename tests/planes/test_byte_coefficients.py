"""Coefficients in bytes: units, and what rounding to them costs."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitstrata.planes import ByteScales, PlaneWeight
from bitstrata.planes.weights import BYTE_BITS, byte_unit, is_byte_unit
from bitstrata.solvers.grouping import make_affine, to_bytes

LARGEST = 61440.0


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_units_reach_what_they_are_made_for_and_are_not_much_larger(values):
    largest = torch.tensor(values, dtype=torch.float64)
    unit = byte_unit(largest)
    assert unit.dtype == torch.float16
    assert is_byte_unit(unit).all()
    reach = unit.double() * 127 / 128
    inside = largest <= LARGEST * 127 / 128
    assert (reach[inside] >= largest[inside] * (1 - 1e-12)).all()
    ordinary = inside & (largest > 2**-11)
    assert (reach[ordinary] <= largest[ordinary] * 1.15).all()
    assert (unit[~inside] == LARGEST).all()


def test_what_is_not_a_unit():
    bad = torch.tensor([-1.0, 1.03125, 2**-15, 2**-14 * 1.5, torch.inf, torch.nan]).half()
    assert not is_byte_unit(bad).any()
    assert is_byte_unit(torch.tensor([0.0, 2**-14, 2**-14 * 15, 1.875, LARGEST]).half()).all()


def test_every_coefficient_is_an_fp16_number():
    """All bytes, all planes, all kinds of unit: nothing is rounded on the way to fp16."""
    units = torch.cat([torch.arange(16) * 2.0**e for e in range(-14, 13)]).half().unique()
    bytes_ = torch.arange(-128, 128).to(torch.int8)
    scale = bytes_.expand(BYTE_BITS, len(units), -1).contiguous()
    fp16 = ByteScales(scale, scale[0].contiguous(), units).affine()
    for plane in range(BYTE_BITS):
        exact = bytes_.double() * units.double().unsqueeze(1) / 2 ** (7 + plane)
        assert torch.equal(fp16.scale[plane].double(), exact)
    assert torch.equal(fp16.offset.double(), bytes_.double() * units.double().unsqueeze(1) / 2**7)
    assert Fraction(fp16.scale[3, 1, 0].item()) == Fraction(-128, 2**10) * Fraction(units[1].item())


def test_rounding_is_to_the_nearest_and_saturates(seed):
    generator = torch.Generator().manual_seed(seed)
    unit = torch.tensor([0.0, 0.125, 3.0]).half()
    coefficients = torch.randn(4, 3, generator=generator) * unit.float()
    rounded = to_bytes(coefficients, unit)
    step = unit.float() * torch.tensor([2.0**-7, 2.0**-8, 2.0**-9, 2.0**-7]).unsqueeze(1)
    clamped = coefficients.clamp(-127 * step, 127 * step)
    assert ((rounded - clamped).abs() <= step / 2 * (1 + 1e-6)).all()
    scales = make_affine(rounded[:-1].unsqueeze(-1), rounded[-1].unsqueeze(-1), unit)
    assert torch.equal(scales.affine().scale[..., 0].float(), rounded[:-1]), "what is rounded already stays"
    assert torch.equal(scales.affine().offset[..., 0].float(), rounded[-1])


def test_bytes_are_for_few_bits_and_then_for_all_of_those():
    def made(bits, unit):
        return make_affine(torch.ones(bits, 2, 1), torch.ones(2, 1), torch.ones(2).half() if unit else None)

    planes = (torch.zeros(2, 1, dtype=torch.int32),) * 5
    assert PlaneWeight(planes, {2: made(2, True), 5: made(5, False)}, 7, 7).kind == "affine8"
    for scales in ({2: made(2, True), 4: made(4, False)}, {4: made(4, True), 5: made(5, True)}):
        with pytest.raises(ValueError, match="scales of up to 4 bits, and no others, have bytes"):
            PlaneWeight(planes, scales, 7, 7)
