"""Bytes of ggml's block types, read back by the gguf package."""

from __future__ import annotations

import pytest
import torch

from bitstrata.exchange.ggml import BLOCK_TYPES

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed (extra gguf)")

# relative error on normal values: what rounding at this spacing must cost at most
LIMITS = {
    "Q2_K": 0.30, "Q3_K": 0.16, "Q4_0": 0.10, "Q4_K": 0.075, "IQ4_NL": 0.085, "Q4_1": 0.08, "Q5_0": 0.05,
    "Q5_K": 0.038, "Q5_1": 0.04, "Q6_K": 0.02, "Q8_0": 0.0065,
}  # fmt: skip


def read(name, data):
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name]))


def error(x, y):
    return float((x.double() - y.double()).norm() / x.double().norm())


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_values_are_near(name):
    kind = BLOCK_TYPES[name]
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert (kind.values, kind.size) == (block, size)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(37, 3 * kind.values, generator=generator) * torch.rand(37, 1, generator=generator)
    data = kind.quantize(x)
    assert data.shape == (37, 3 * kind.size)
    found = error(x, read(name, data))
    assert found < LIMITS[name]
    if name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):  # never worse than the package's own, which is ggml's
        theirs = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[name])
        assert found <= error(x, read(name, torch.from_numpy(theirs))) * 1.0001


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_edges(name):
    kind = BLOCK_TYPES[name]
    x = torch.zeros(6, kind.values)
    x[1] = 0.5
    x[2] = -0.25
    x[3, ::2] = 1e-7  # below fp16's normal numbers
    x[4] = torch.linspace(0.1, 0.2, kind.values)  # no sign change
    x[5, 3] = 40.0
    y = read(name, kind.quantize(x))
    assert bool(y.isfinite().all())
    assert torch.equal(y[0], x[0])
    assert error(x[1], y[1]) < 1e-3
    assert error(x[2], y[2]) < 1e-3
    assert float((y[3] - x[3]).abs().max()) < 1e-6
    assert error(x[4], y[4]) < 0.2
    assert error(x[5], y[5]) < (0.05 if name == "IQ4_NL" else 1e-2)  # IQ4_NL has no zero


@pytest.mark.parametrize(
    ("name", "bits", "offset"),
    [
        *((name, bits, 0.0) for name, most in (("Q8_0", 7), ("Q5_1", 5), ("Q4_1", 4)) for bits in range(1, most + 1)),
        *(
            (name, bits, 0.3)
            for name, most in (("Q5_1", 5), ("Q4_1", 4), ("Q4_K", 4), ("Q2_K", 2))
            for bits in (1, most)
        ),
    ],
)
def test_uniform_codes_are_held(name, bits, offset):
    """Levels low + step q of fp16 coefficients in groups of 128: the error is that of fp16 at most, or none."""
    kind = BLOCK_TYPES[name]
    generator = torch.Generator().manual_seed(bits)
    groups = 6
    half = (torch.rand(9, groups, generator=generator) * 0.05 + 0.01).half().float()
    middle = (half * offset * torch.randn(9, groups, generator=generator)).half().float()
    top = 2**bits - 1
    q = torch.randint(0, top + 1, (9, groups * 128), generator=generator)
    step, low = (part.repeat_interleave(128, 1) for part in (2 * half, middle - half * top))
    x = low + step * q
    found = error(x, read(name, kind.quantize(x, step, low)))
    if name == "Q8_0":
        assert found == 0
    else:
        assert found < (2e-2 if name == "Q2_K" and offset else 5e-3 if name == "Q4_K" else 5e-4)
