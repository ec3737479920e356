"""Keys and values as codes: what they are off by, what they take, and what is not a number."""

from __future__ import annotations

import pytest
import torch

from bitstrata.errors import UsageError
from bitstrata.kernels.cached import BITS, check_kv_cache_dtype, code_bytes, decode, encode, head_bytes

WIDTHS = [1, 2, 7, 20, 33, 64, 80, 96, 128, 256]


def transform(width):
    """The definition, float64: entry (i, j) is -1 to the number of ones that i and j share, of each block."""
    block = width & -width
    one = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)])
    return torch.block_diag(*[one.double() / block**0.5] * (width // block))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_number_is_off_by_half_a_step_at_most(width, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 50, width, generator=generator) * torch.rand(3, 50, 1, generator=generator).exp2()
    x[:, :, 0] += 8  # as keys have
    codes, meaning = encode(x, bits)
    assert codes.dtype == torch.uint8
    assert codes.shape == (3, 50, code_bytes(width, bits))
    assert meaning.dtype == torch.bfloat16
    mixed, found = (one.double() @ transform(width) for one in (x, decode(codes, meaning, width, bits)))
    low, high = mixed.amin(-1, keepdim=True), mixed.amax(-1, keepdim=True)
    step = meaning[..., :1].double()
    assert ((found - mixed).abs() <= step / 2 + 1e-5 * mixed.abs().amax()).all()
    # outwards by what bf16 cannot say, and no more
    assert (step <= ((high - low + low.abs() / 128) / (2**bits - 1) * (1 + 1 / 128)) + 1e-6).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_equal_numbers_come_back_as_they_were(bits):
    """Zeros, and what bf16 has, whatever the step would be."""
    for value in (0.0, 1.0, -3.5, 1e-38, 2.0**100):
        x = torch.full((1, 1, 7), value)
        torch.testing.assert_close(decode(*encode(x, bits), 7, bits), x, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_head_that_holds_no_number_is_none(bits, value):
    x = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0))
    plain = decode(*encode(x, bits), 20, bits)
    x[1, 2, 5] = value
    found = decode(*encode(x, bits), 20, bits)
    assert found[1, 2].isnan().all()
    found[1, 2] = plain[1, 2]
    assert torch.equal(found, plain), "and no other head is"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_depends_on_its_own_numbers_alone(dtype):
    x = torch.randn(4, 9, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    for bits in (8, 4):
        whole, meaning = encode(x, bits)
        alone, own = encode(x[2:3, 4:5], bits)
        assert torch.equal(whole[2:3, 4:5], alone)
        assert torch.equal(meaning[2:3, 4:5], own)


@pytest.mark.parametrize(
    ("kind", "width", "expected"),
    [
        ("auto", 64, 128),
        ("int8", 64, 68),
        ("int4", 64, 36),
        ("int8", 20, 24),
        ("int4", 20, 20),
        ("int4", 80, 52),
        ("int8", 7, 11),
        ("int4", 7, 20),
    ],
)
def test_bytes_of_a_head(kind, width, expected):
    assert head_bytes(width, kind, torch.bfloat16) == expected
    if BITS[kind] is not None:
        held = encode(torch.zeros(1, 1, width), BITS[kind])
        assert sum(one.nbytes for one in held) == expected


@pytest.mark.parametrize("wrong", ["", "fp8", "INT8", "float16", None, 8])
def test_others_are_refused_with_the_list(wrong):
    with pytest.raises(UsageError, match="kv_cache_dtype") as caught:
        check_kv_cache_dtype(wrong)
    assert "auto, int8, int4" in str(caught.value.hint)
