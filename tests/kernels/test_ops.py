"""The two operations as torch ops: schema, fakes, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from helpers import random_weight
from torch._subclasses.fake_tensor import FakeTensorMode

from bitstrata.errors import KernelError, UnsupportedBitsError
from bitstrata.kernels import plane_linear, plane_linear_rows
from bitstrata.kernels.api import _arguments

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
@pytest.mark.parametrize("shape", [(3,), (2, 3), (1,), ()], ids=str)
def test_opcheck_of_plane_linear(scales, shape):
    x = torch.randn(*shape, K)
    torch.library.opcheck(torch.ops.bitstrata.plane_linear.default, arguments(make(scales), x, 4), test_utils=OPCHECK)


@scales
@pytest.mark.parametrize("shape", [(3,), (2, 3), (1,)], ids=str)
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


@scales
def test_bits_without_a_scales_are_refused(scales):
    weight, x = make(scales), torch.randn(2, K)
    for bits in (0, 1, 3, 5, -1):
        with pytest.raises(UnsupportedBitsError) as caught:
            plane_linear(x, weight, bits)
        assert caught.value.hint == "supported bits: 2, 4"
        with pytest.raises(UnsupportedBitsError):
            torch.ops.bitstrata.plane_linear(*arguments(weight, x, bits))
        with pytest.raises(UnsupportedBitsError, match=rf"\[{bits}\]"):
            plane_linear_rows(x, weight, torch.tensor([2, bits]))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (7,), (2, 3), (6, 1)], ids=str)
def test_row_bits_must_have_one_entry_a_row(shape):
    with pytest.raises(ValueError, match=r"row_bits must have shape \[6\]"):
        plane_linear_rows(torch.randn(2, 3, K), make(), torch.full(shape, 2))


@pytest.mark.parametrize("columns", [1, K - 1, K + 1, 96, 64], ids=lambda k: f"{k}-columns")
def test_activations_of_the_wrong_width_are_refused(columns):
    """Also where the number of words and groups would fit."""
    x = torch.randn(2, columns)
    with pytest.raises(ValueError, match=rf"expected x \[\.\.\., 70\], got \[2, {columns}\]"):
        plane_linear(x, make(), 2)
    with pytest.raises(ValueError, match="expected x"):
        plane_linear_rows(x, make(), torch.tensor([2, 2]))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool], ids=str)
def test_activations_that_are_not_floating_point_have_no_kernel(dtype):
    x = torch.ones(2, K).to(dtype)
    with pytest.raises(KernelError):
        plane_linear(x, make(), 2)
    with pytest.raises(KernelError):
        plane_linear_rows(x, make(), torch.tensor([2, 2]))


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


def test_autocast_does_not_change_the_dtype_of_the_result(seed: int) -> None:
    weight = random_weight(8, 64, seed=seed)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))
    rows = torch.tensor([2, 3, 4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        uniform, mixed = plane_linear(x, weight, 3), plane_linear_rows(x, weight, rows)
    assert torch.equal(uniform, plane_linear(x, weight, 3))
    assert torch.equal(mixed, plane_linear_rows(x, weight, rows))
