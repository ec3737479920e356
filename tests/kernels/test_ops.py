"""The two operations on stored weights as torch ops: schema and fakes; test_prepared_ops.py has what all refuse."""

from __future__ import annotations

import pytest
import torch
from bitstrata.kernels.api import _arguments
from helpers import random_weight
from torch._subclasses.fake_tensor import FakeTensorMode

from bitstrata.kernels import plane_linear, plane_linear_rows

N, K = 5, 70
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
scales = pytest.mark.parametrize("scales", ["affine", "affine8", "codebook"])


def make(scales="affine"):
    return random_weight(N, K, bits=(2, 4), kind=scales)


def arguments(weight, x, bits):
    """The arguments of either op as the dispatcher gets them; `bits` an int or a tensor."""
    return (x, *_arguments(weight, weight.bits), bits)


OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@scales
@pytest.mark.parametrize("shape", [(2, 3), ()], ids=str)
def test_opcheck_of_plane_linear(scales, shape):
    x = torch.randn(*shape, K)
    torch.library.opcheck(torch.ops.bitstrata.plane_linear.default, arguments(make(scales), x, 4), test_utils=OPCHECK)


@scales
@pytest.mark.parametrize("shape", [(2, 3)], ids=str)
def test_opcheck_of_plane_linear_rows(scales, shape):
    x = torch.randn(*shape, K)
    row_bits = torch.tensor([2, 4] * 3, dtype=torch.int8)[: x.shape[:-1].numel()]
    torch.library.opcheck(
        torch.ops.bitstrata.plane_linear_rows.default, arguments(make(scales), x, row_bits), test_utils=OPCHECK
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (0,), (4, 0), ()], ids=str)
def test_fakes_tell_the_shape_dtype_and_strides_of_the_result(shape, dtype):
    weight = make()
    x = torch.randn(*shape, K).to(dtype)
    row_bits = torch.full((x.shape[:-1].numel(),), 2)
    for op, bits in ((torch.ops.bitstrata.plane_linear, 2), (torch.ops.bitstrata.plane_linear_rows, row_bits)):
        real = op(*arguments(weight, x, bits))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = op(*arguments(weight, mode.from_tensor(x), bits))
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, dtype, real.stride())
        assert real.shape == (*shape, N)


def test_the_meta_device_is_enough_to_trace_shapes():
    weight = make()
    meta = arguments(weight, torch.empty(2, 3, K, device="meta", dtype=torch.bfloat16), 4)
    moved = [[t.to("meta") for t in a] if isinstance(a, list) and a and torch.is_tensor(a[0]) else a for a in meta]
    y = torch.ops.bitstrata.plane_linear(*moved)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 3, N), torch.bfloat16)


def test_weights_and_activations_are_left_alone():
    weight, x = make(), torch.randn(3, K)
    before = [t.clone() for t in (x, *weight.tensors().values())]
    plane_linear(x, weight, 4)
    plane_linear_rows(x, weight, torch.tensor([2, 4, 2]))
    for old, new in zip(before, (x, *weight.tensors().values()), strict=True):
        assert torch.equal(old, new)


def test_higher_planes_are_not_handed_to_the_op():
    assert len(_arguments(make(), [2])[0]) == 2
    assert len(_arguments(make(), [2, 4])[0]) == 4
