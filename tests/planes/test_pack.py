"""pack_bits and unpack_bits: one plane as 32-bit words, lowest column in the lowest bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from bitstrata.planes import pack_bits, unpack_bits, words_per_row

WIDTHS = st.one_of(st.sampled_from([1, 31, 32, 33, 63, 64, 65, 70]), st.integers(1, 200))
LEADING = st.sampled_from([(), (1,), (3,), (2, 3), (0,), (2, 0, 3)])
BITS = st.builds(lambda leading, columns: (*leading, columns), LEADING, WIDTHS).flatmap(
    lambda shape: npst.arrays(bool, shape)
)


@given(BITS)
def test_unpack_inverts_pack(bits):
    bits = torch.from_numpy(bits)
    words = pack_bits(bits)
    assert words.dtype == torch.int32
    assert words.shape == (*bits.shape[:-1], words_per_row(bits.shape[-1]))
    assert torch.equal(unpack_bits(words, bits.shape[-1]), bits)


@given(BITS)
def test_padding_bits_are_zero(bits):
    bits = torch.from_numpy(bits)
    words = pack_bits(bits)
    everything = unpack_bits(words, 32 * words.shape[-1])
    assert not everything[..., bits.shape[-1] :].any()


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=4))
def test_pack_inverts_unpack(values):
    words = torch.tensor(values, dtype=torch.int32)
    assert torch.equal(pack_bits(unpack_bits(words, 32 * len(values))), words)


@pytest.mark.parametrize(
    ("columns", "ones", "expected"),
    [
        pytest.param(32, [0], [1], id="column-0-is-bit-0"),
        pytest.param(32, [1, 5, 8], [0b1_0010_0010], id="lowest-column-in-lowest-bit"),
        pytest.param(32, [31], [-(2**31)], id="column-31-is-the-sign-bit"),
        pytest.param(32, range(32), [-1], id="all-32"),
        pytest.param(33, range(33), [-1, 1], id="33-columns-pad-with-zeros"),
        pytest.param(70, [0, 31, 32, 64, 69], [1 - 2**31, 1, 1 + 2**5], id="three-words"),
        pytest.param(1, [0], [1], id="one-column"),
    ],
)
def test_layout_of_words(columns, ones, expected):
    bits = torch.zeros(columns, dtype=torch.bool)
    bits[list(ones)] = True
    assert pack_bits(bits).tolist() == expected
    assert unpack_bits(torch.tensor(expected, dtype=torch.int32), columns).nonzero().flatten().tolist() == list(ones)


def test_unpack_ignores_set_padding_bits():
    assert unpack_bits(torch.tensor([-1], dtype=torch.int32), 3).tolist() == [True, True, True]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_zeros_and_ones_of_any_dtype_pack_alike(dtype):
    bits = torch.tensor([1, 0, 1, 1, 0]).to(dtype)
    assert pack_bits(bits).tolist() == [0b1101]


def test_packs_non_contiguous_bits(seed):
    bits = torch.rand(40, 6, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert torch.equal(pack_bits(bits.T), pack_bits(bits.T.contiguous()))
    assert torch.equal(unpack_bits(pack_bits(bits).T.contiguous().T, 6), bits)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([-1.0, 1.0], id="signs"),
        pytest.param([-1.0, 0.0, 1.0], id="torch-sign-with-a-zero"),
        pytest.param([0, 2], id="two"),
        pytest.param([0.5], id="fraction"),
        pytest.param([float("nan")], id="nan"),
    ],
)
def test_rejects_anything_but_zeros_and_ones(values):
    with pytest.raises(ValueError, match="zeros and ones only"):
        pack_bits(torch.tensor(values))


@pytest.mark.parametrize(
    ("words", "columns"),
    [
        pytest.param(torch.zeros(2, 2, dtype=torch.int64), 64, id="int64"),
        pytest.param(torch.zeros(2, 2, dtype=torch.int32), 65, id="too-few-words"),
        pytest.param(torch.zeros(2, 2, dtype=torch.int32), 32, id="too-many-words"),
    ],
)
def test_unpack_rejects_words_that_do_not_fit(words, columns):
    with pytest.raises(ValueError, match=rf"expected int32 words .* for {columns} columns"):
        unpack_bits(words, columns)
