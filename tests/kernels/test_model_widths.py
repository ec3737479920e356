"""A layer as wide as those of a model of 8 billion weights, on the best instruction set."""

from __future__ import annotations

import pytest
import torch
from helpers import random_weight
from instruction_sets import BEST
from kernel_errors import promise_of

from bitstrata.kernels import pack
from bitstrata.planes import decode

pytestmark = pytest.mark.skipif(not BEST, reason="the native kernels are not built")
BITS = (2, 4)
LAYERS = {
    "up": (14336, 4096, 128, "affine"),
    "down": (4096, 14336, 128, "affine8"),
}
SAMPLE = 48  # output channels compared in float64


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_of_a_model(layer, seed):
    n, k, group_size, kind = LAYERS[layer]
    generator = torch.Generator().manual_seed(seed)
    weight = random_weight(n, k, BITS, group_size, kind, seed)
    packed = pack(weight, kernel=BEST)
    index = torch.cat([torch.tensor([0, n - 1]), torch.randint(n, (SAMPLE - 2,), generator=generator)])
    for bits in BITS:
        W, check = decode(weight, bits, torch.float32), promise_of(packed.kernel, weight.take(index), bits)
        for rows, dtype in ((1, torch.float32), (1, torch.bfloat16), (5, torch.float32), (40, torch.bfloat16)):
            x = torch.randn(rows, k, generator=generator).to(dtype)
            y = packed.linear(x, bits)
            check(y[:, index], x, layer)
            expected = x.float() @ W.T
            error, size = y.float() - expected, expected.square().mean().sqrt()
            # roundings spread over thousands of terms; a group or a chunk that is missing does not
            assert error.square().mean().sqrt() < 0.02 * size, f"{bits} bits, {rows} rows, {dtype}"
            assert error.abs().max() < 0.1 * size, f"{bits} bits, {rows} rows, {dtype}"
    mixed, x = torch.tensor([2, 4, 4, 2, 4], dtype=torch.int8), torch.randn(5, k, generator=generator)
    together = packed.linear(x, mixed)
    for bits in BITS:
        assert torch.equal(together[mixed == bits], packed.linear(x, bits)[mixed == bits])
