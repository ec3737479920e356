"""Other ways to write the same weight, turned into planes and scales without loss."""

from __future__ import annotations

import pytest
import torch

from bitstrata.planes import AffineScales, Codebook, PlaneWeight, decode, group_count, pack_bits

N, K = 5, 70


def planes_of(code: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    """The planes of integer codes [N, K], plane 0 the most significant bit."""
    return tuple(pack_bits((code >> (bits - 1 - i)) & 1) for i in range(bits))


def random_codes(bits: int, seed: int) -> torch.Tensor:
    return torch.randint(2**bits, (N, K), generator=torch.Generator().manual_seed(seed))


def sixteenths(*shape: int, seed: int) -> torch.Tensor:
    """Random multiples of 1/16 below 4 in size: fp16 holds them and their sums exactly."""
    return torch.randint(-63, 64, shape, generator=torch.Generator().manual_seed(seed)).double() / 16


@pytest.mark.parametrize("bits", range(1, 9))
def test_affine_to_codebook_by_enumeration(bits, seed):
    scale, offset = sixteenths(bits, N, 1, seed=seed), sixteenths(N, 1, seed=seed + 1)
    affine = AffineScales(scale.half(), offset.half())
    planes = planes_of(random_codes(bits, seed), bits)
    code = torch.arange(2**bits)
    table = offset.repeat(1, 2**bits)
    for i in range(bits):
        table += scale[i] * (2 * ((code >> (bits - 1 - i)) & 1) - 1)
    codebook = Codebook(table.half())
    assert torch.equal(
        decode(PlaneWeight(planes, {bits: affine}, K, K), bits, torch.float64),
        decode(PlaneWeight(planes, {bits: codebook}, K, K), bits, torch.float64),
    )


def uniform_grid(bits: int, group_size: int, seed: int):
    """Codes q, step s and zero point of a uniform grid s (q - zero), with the affine scales that equals it."""
    J = group_count(K, group_size)
    code = random_codes(bits, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    step = torch.exp2(torch.randint(-6, 0, (N, J), generator=generator).double())
    zero = torch.randint(2**bits, (N, J), generator=generator).double()
    scale = torch.stack([step * 2.0 ** (bits - 1 - i) / 2 for i in range(bits)])
    offset = step * ((2**bits - 1) / 2 - zero)
    assert torch.equal(offset.half().double(), offset)  # the conversion itself is exact here
    group = torch.arange(K) // group_size
    return code, step[:, group], zero[:, group], AffineScales(scale.half(), offset.half())


@pytest.mark.parametrize("group_size", [32, 43, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_uniform_grid_to_affine(bits, group_size, seed):
    code, step, zero, scales = uniform_grid(bits, group_size, seed)
    weight = PlaneWeight(planes_of(code, bits), {bits: scales}, K, group_size)
    assert torch.equal(decode(weight, bits, torch.float64), step * (code - zero))


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_dropping_low_planes_of_a_grid_leaves_the_mean_of_the_dropped_codes(kept, seed):
    bits, group_size = 4, 43
    code, step, zero, scales = uniform_grid(bits, group_size, seed)
    sliced = AffineScales(scales.scale[:kept].clone(), scales.offset)
    weight = PlaneWeight(planes_of(code, bits)[:kept], {kept: sliced}, K, group_size)
    width = 2 ** (bits - kept)
    mean = (code // width * width).double() + (width - 1) / 2
    assert torch.equal(decode(weight, kept, torch.float64), step * (mean - zero))


def test_zero_one_coefficients_to_signs(seed):
    bits = 3
    code = random_codes(bits, seed)
    coefficient, constant = sixteenths(bits, N, 1, seed=seed), sixteenths(N, 1, seed=seed + 1)
    expected = constant.repeat(1, K)
    for i in range(bits):
        expected += coefficient[i] * ((code >> (bits - 1 - i)) & 1)
    scales = AffineScales((coefficient / 2).half(), (constant + coefficient.sum(0) / 2).half())
    weight = PlaneWeight(planes_of(code, bits), {bits: scales}, K, K)
    assert torch.equal(decode(weight, bits, torch.float64), expected)
