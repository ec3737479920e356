"""torch.compile traces the layers without a graph break, whatever the bits."""

from __future__ import annotations

import pytest
import torch
from helpers import plane_model

from bitstrata.nn import use_bits


@pytest.fixture
def compiled(seed):
    torch._dynamo.reset()
    model = plane_model(seed, bias=True)
    yield model, torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


def check(compiled, x, bits):
    model, fast = compiled
    with use_bits(model, bits):
        y = fast(x)
        torch.testing.assert_close(y, model(x))
    return y


def test_int_bits_switched_several_times(compiled):
    x = torch.randn(3, 70, dtype=torch.float64)
    first = {bits: check(compiled, x, bits) for bits in (4, 2, 3)}
    for bits in (2, 4, 3, 3, 2):
        assert torch.equal(check(compiled, x, bits), first[bits])
    assert not torch.equal(first[2], first[4])


def test_a_plan(compiled):
    x = torch.randn(3, 70, dtype=torch.float64)
    check(compiled, x, {"0": 2, "1": 4})
    check(compiled, x, {"0": 4, "1": 2})


@pytest.mark.parametrize("leading", [(4,), (2, 3)], ids=["rows", "batch-and-sequence"])
def test_tensor_bits(compiled, leading):
    x = torch.randn(*leading, 70, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        check(compiled, x, torch.randint(2, 5, leading[:1], generator=generator))
    check(compiled, x, torch.randint(2, 5, (x[..., 0].numel(),), generator=generator))


def test_from_int_to_tensor_and_back(compiled):
    x = torch.randn(4, 70, dtype=torch.float64)
    for bits in (3, torch.tensor([2, 4, 3, 2]), 2, torch.tensor([4, 4, 4, 4])):
        check(compiled, x, bits)


def test_other_batch_sizes(compiled):
    for rows in (2, 5, 9):
        check(compiled, torch.randn(rows, 70, dtype=torch.float64), 3)


def test_bits_set_inside_the_compiled_function(seed):
    torch._dynamo.reset()
    model = plane_model(seed)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x, bits):
        with use_bits(model, bits):
            return model(x)

    x = torch.randn(3, 70, dtype=torch.float64)
    for bits in (2, 4, 3, 2):
        with use_bits(model, bits):
            expected = model(x)
        torch.testing.assert_close(run(x, bits), expected)
    assert model[0].bits_state.value == 4
    torch._dynamo.reset()
