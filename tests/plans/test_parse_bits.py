"""parse_bits: what a person may type for --bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitstrata.errors import UsageError
from bitstrata.plans import parse_bits


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", (3,)),
        (3, (3,)),
        ("1", (1,)),
        ("8", (8,)),
        ("2-4", (2, 3, 4)),
        ("3-3", (3,)),
        ("1-8", (1, 2, 3, 4, 5, 6, 7, 8)),
        ("2,4", (2, 4)),
        ("4,2", (2, 4)),
        ("2,2,3-4,4", (2, 3, 4)),
        ("2-3,6-7", (2, 3, 6, 7)),
        (" 2 - 4 , 6 ", (2, 3, 4, 6)),
        ([4, 2], (2, 4)),
        ((2, 3, 3), (2, 3)),
        ({3}, (3,)),
        (range(2, 5), (2, 3, 4)),
        (["2-3", "5"], (2, 3, 5)),
        (np.int64(3), (3,)),
        (torch.tensor(3), (3,)),
        (np.array([4, 2]), (2, 4)),
        (torch.tensor([2, 3]), (2, 3)),
        ([np.int8(2), torch.tensor(4)], (2, 4)),
        pytest.param(iter([2]), (2,), id="an iterator-(2,)"),
    ],
    ids=repr,
)
def test_good(text, expected):
    assert parse_bits(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ",",
        "2,",
        "2,,3",
        "two",
        "2.5",
        "2;3",
        "2 3",
        "-",
        "2-",
        "-2",
        "2-3-4",
        "2--4",
        "4-2",
        "3,4-2",
        "0",
        "9",
        "0-3",
        "7-9",
        "3,9",
        "1-1000000000000",
        "99999999999999999999",
        0,
        9,
        -3,
        True,
        [],
        [0],
        [True],
        [2.0],
        [2, None],
        3.0,
        None,
        np.float64(3),
        np.bool_(True),
        np.int64(9),
    ],
    ids=repr,
)
def test_bad(text):
    with pytest.raises(UsageError, match="cannot be used") as caught:
        parse_bits(text)
    assert "from 1 to 8" in caught.value.hint
