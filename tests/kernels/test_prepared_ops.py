"""The operations on prepared weights: as torch ops, as functions, and what they refuse."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from helpers import random_weight
from kernel_errors import promise_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from bitstrata.errors import KernelError, UnsupportedBitsError, UsageError
from bitstrata.kernels import (
    plane_linear,
    plane_linear_rows,
    plane_lookup,
    prepared_linear,
    prepared_lookup,
    registry,
)
from bitstrata.kernels.cpu import BlockedWeight, missing
from bitstrata.planes import decode

N, K = 5, 70
BITS = (2, 4, 6)
OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.skipif(bool(missing), reason="the native kernels are not built")
scales = pytest.mark.parametrize("scales", ["affine", "affine8", "codebook"])
ops = pytest.mark.parametrize("rows_op", [False, True], ids=["prepared_linear", "prepared_linear_rows"])


def make(scales="affine"):
    return random_weight(N, K, BITS, kind=scales)


def arguments(packed, x, bits):
    """The arguments of either op as the dispatcher gets them; `bits` an int or a tensor."""
    chosen = BITS if isinstance(bits, torch.Tensor) else (bits,)
    return (
        x,
        list(packed.planes[: max(chosen)]),
        [packed.scales[value] for value in chosen],
        list(chosen),
        packed.layout,
        packed.out_features,
        packed.group_size,
        packed.kind,
        bits,
    )


def op_and_bits(rows_op, x):
    if rows_op:
        rows = x.shape[:-1].numel()
        return torch.ops.bitstrata.prepared_linear_rows, torch.tensor(BITS)[torch.arange(rows) % len(BITS)]
    return torch.ops.bitstrata.prepared_linear, 4


@ops
@scales
@pytest.mark.parametrize("shape", [(2, 3), (17,)], ids=str)
def test_opcheck(scales, shape, rows_op):
    x = torch.randn(*shape, K)
    op, bits = op_and_bits(rows_op, x)
    torch.library.opcheck(op.default, arguments(BlockedWeight.pack(make(scales)), x, bits), test_utils=OPCHECK)


@ops
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (0,), (4, 0), ()], ids=str)
def test_fakes_tell_the_shape_dtype_and_strides_of_the_result(shape, dtype, rows_op):
    x = torch.randn(*shape, K).to(dtype)
    op, bits = op_and_bits(rows_op, x)
    packed = BlockedWeight.pack(make())
    real = op(*arguments(packed, x, bits))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = op(*arguments(packed, mode.from_tensor(x), bits))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, dtype, real.stride())
    assert real.shape == (*shape, N)


@pytest.mark.filterwarnings("ignore:.*unpacked at every call")
@scales
@pytest.mark.parametrize("kernel", ["scalar", "scalar-int8", "scalar-exact", "reference"])
def test_op_function_and_unprepared_agree(kernel, scales, seed, monkeypatch):
    """The same kernel on the same bits: equal to the last one."""
    monkeypatch.setenv(registry.ENVIRONMENT, kernel)
    weight = random_weight(N, K, BITS, kind=scales, seed=seed)
    packed = BlockedWeight.pack(weight)
    for rows in (1, 6, 20):
        x = torch.randn(rows, K)
        for rows_op in (False, True):
            op, bits = op_and_bits(rows_op, x)
            expected = (plane_linear_rows if rows_op else plane_linear)(x, weight, bits)
            assert torch.equal(op(*arguments(packed, x, bits)), expected)
            (y,) = prepared_linear(x, [packed], bits)
            assert torch.equal(y, expected)


def non_contiguous(kind, seed):
    x = torch.randn(18, 2 * K, generator=torch.Generator().manual_seed(seed))
    return {
        "columns": x[:9, ::2],
        "rows": x[::2, :K],
        "transposed": torch.randn(K, 9, generator=torch.Generator().manual_seed(seed)).T,
        "expanded": x[:1, :K].expand(9, K),
        "middle-of-three": x[:, :K].reshape(2, 9, K).transpose(0, 1),
        "channels": x[:, :K].reshape(3, 6, K).transpose(0, 1),
    }[kind]


@pytest.mark.parametrize("kind", ["columns", "rows", "transposed", "expanded", "middle-of-three", "channels"])
def test_non_contiguous_activations(kind, seed):
    x, packed = non_contiguous(kind, seed), BlockedWeight.pack(make())
    assert not x.is_contiguous()
    for rows_op in (False, True):
        op, bits = op_and_bits(rows_op, x)
        expected = prepared_linear(x.contiguous(), [packed], bits)[0]
        assert torch.equal(prepared_linear(x, [packed], bits)[0], expected)
        assert torch.equal(op(*arguments(packed, x, bits)), expected)


@pytest.mark.parametrize("leading", [(0,), (0, 4), (4, 0)], ids=str)
def test_no_rows(leading):
    packed, x = BlockedWeight.pack(make()), torch.randn(*leading, K)
    for bits in (4, torch.zeros(0, dtype=torch.int8)):
        for y in prepared_linear(x, [packed, packed], bits):
            assert y.shape == (*leading, N)


UNPACKED = "unpacked at every call, which is slow"


@ops
def test_float64_goes_to_a_kernel_that_can_and_says_what_it_costs(rows_op, seed, monkeypatch):
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    weight = random_weight(N, K, BITS, seed=seed)
    x = torch.randn(6, K, dtype=torch.float64)
    _, bits = op_and_bits(rows_op, x)
    packed = BlockedWeight.pack(weight)
    with pytest.warns(UserWarning, match=rf"activations in torch.float64: kernel 'reference'.*{UNPACKED}.*float32"):
        (y,) = prepared_linear(x, [packed], bits)
    with pytest.warns(UserWarning, match=UNPACKED):
        rows = prepared_lookup(torch.arange(N), packed, 4, torch.float64)
    assert torch.equal(rows, decode(weight, 4, torch.float64))
    row_bits = bits if rows_op else torch.full((6,), bits)
    for value in row_bits.unique().tolist():
        rows = row_bits == value
        promise_of(registry._KERNELS["reference"], weight, value)(y[rows], x[rows], "float64")


def test_a_slow_call_is_said_once_and_a_fast_one_never(monkeypatch):
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    packed, x = BlockedWeight.pack(make()), torch.randn(6, K)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for dtype in DTYPES:
            prepared_linear(x.to(dtype), [packed], 4)
            prepared_lookup(torch.arange(N), packed, 4, dtype)
        assert seen == []
        for _ in range(3):
            prepared_linear(x.double(), [packed, packed], 4)
    assert len(seen) == 1


def test_a_forced_kernel_of_another_layout_says_what_it_costs(seed, monkeypatch):
    monkeypatch.setenv(registry.ENVIRONMENT, "reference")
    weight, x = random_weight(N, K, BITS, seed=seed), torch.randn(6, K)
    with pytest.warns(UserWarning, match=rf"BITSTRATA_KERNEL=reference: .*{UNPACKED}. Unset BITSTRATA_KERNEL"):
        (y,) = prepared_linear(x, [BlockedWeight.pack(weight)], 4)
    assert torch.equal(y, plane_linear(x, weight, 4))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64], ids=str)
def test_activations_that_are_not_floating_point_have_no_kernel(dtype):
    packed, x = BlockedWeight.pack(make()), torch.ones(2, K).to(dtype)
    for bits in (2, torch.tensor([2, 4])):
        with pytest.raises(KernelError):
            prepared_linear(x, [packed], bits)
    for call in (lambda: plane_linear(x, make(), 2), lambda: plane_linear_rows(x, make(), torch.tensor([2, 4]))):
        with pytest.raises(KernelError):
            call()


@scales
def test_bits_without_a_scales_are_refused(scales):
    weight, x = make(scales), torch.randn(2, K)
    packed = BlockedWeight.pack(weight)
    for bits in (0, 1, 3, 5, 8, -1):
        row_bits = torch.tensor([2, bits])
        for call in (lambda bits: prepared_linear(x, [packed], bits), lambda bits: plane_linear(x, weight, bits)):
            with pytest.raises(UnsupportedBitsError) as caught:
                call(bits)
            assert caught.value.hint == "supported bits: 2, 4, 6"
        with pytest.raises(UnsupportedBitsError, match=rf"\[{bits}\]"):
            prepared_linear(x, [packed], row_bits)
        with pytest.raises(UnsupportedBitsError, match=rf"\[{bits}\]"):
            plane_linear_rows(x, weight, row_bits)
        with pytest.raises(UnsupportedBitsError):
            torch.ops.bitstrata.prepared_linear(*arguments(packed, x, 2)[:-1], bits)


@pytest.mark.parametrize("bits", [2.0, True, "2", None, [2], np.float64(2), np.bool_(True)], ids=repr)
def test_bits_that_are_no_integer_are_refused(bits):
    weight, x = random_weight(N, K, (1, 2)), torch.randn(2, K)
    packed = BlockedWeight.pack(weight)
    for call in (
        lambda: prepared_linear(x, [packed], bits),
        lambda: plane_linear(x, weight, bits),
        lambda: prepared_lookup(torch.tensor([1]), packed, bits, torch.float32),
        lambda: plane_lookup(torch.tensor([1]), weight, bits, torch.float32),
    ):
        with pytest.raises(UsageError, match="bits must be an int, got"):
            call()


@pytest.mark.parametrize("kind", [np.int64, np.int8, np.uint8])
def test_integers_of_numpy_are_bits(kind, seed):
    weight, x = random_weight(N, K, BITS, seed=seed), torch.randn(2, K)
    packed, index = BlockedWeight.pack(weight), torch.tensor([1, 4])
    assert torch.equal(prepared_linear(x, [packed], kind(4))[0], prepared_linear(x, [packed], 4)[0])
    assert torch.equal(plane_linear(x, weight, kind(4)), plane_linear(x, weight, 4))
    assert torch.equal(prepared_lookup(index, packed, kind(4), torch.float32), decode(weight, 4)[index])
    assert torch.equal(plane_lookup(index, weight, kind(4), torch.float32), decode(weight, 4)[index])
    with pytest.raises(UnsupportedBitsError):
        plane_linear(x, weight, kind(3))


@pytest.mark.parametrize(
    "bits",
    [torch.tensor([2.0, 2.0]), torch.tensor([True, True]), torch.tensor([2 + 0j, 2])],
    ids=["float", "bool", "complex"],
)
def test_row_bits_that_are_no_integers_are_refused(bits):
    weight, x = random_weight(N, K, (1, 2)), torch.randn(2, K)
    with pytest.raises(UsageError, match="row_bits must be an integer tensor, got torch"):
        prepared_linear(x, [BlockedWeight.pack(weight)], bits)
    with pytest.raises(UsageError, match="row_bits must be an integer tensor, got torch"):
        plane_linear_rows(x, weight, bits)
    with pytest.raises(UsageError, match="row_bits must be an integer tensor, got list"):
        plane_linear_rows(x, weight, [2, 2])


@pytest.mark.parametrize("bits", [2, torch.tensor([2, 2])], ids=["int", "rows"])
def test_activations_that_are_no_rows_are_refused(bits):
    weight = make()
    packed, function = BlockedWeight.pack(weight), plane_linear if isinstance(bits, int) else plane_linear_rows
    for x, message in (
        (torch.tensor(1.0), r"expected x \[\.\.\., 70\], got \[\]"),
        (torch.ones(2, K).to_sparse(), "x must be dense"),
        ([1.0] * K, "x must be a tensor, got list"),
        (np.ones((2, K)), "x must be a tensor, got ndarray"),
    ):
        with pytest.raises(UsageError, match=message):
            prepared_linear(x, [packed], bits)
        with pytest.raises(UsageError, match=message):
            function(x, weight, bits)


@pytest.mark.parametrize("index", [torch.tensor([1.7]), torch.tensor([True]), [1]], ids=["float", "bool", "list"])
def test_an_index_that_is_no_integer_is_refused(index):
    weight = make()
    with pytest.raises(UsageError, match="index must be an integer tensor"):
        plane_lookup(index, weight, 2, torch.float32)
    with pytest.raises(UsageError, match="index must be an integer tensor"):
        prepared_lookup(index, BlockedWeight.pack(weight), 2, torch.float32)


def test_a_lookup_refuses_bits_and_dtypes_that_there_are_not():
    weight, index = make(), torch.tensor([1])
    for lookup, held in ((plane_lookup, weight), (prepared_lookup, BlockedWeight.pack(weight))):
        with pytest.raises(UnsupportedBitsError):
            lookup(index, held, 3, torch.float32)
        with pytest.raises(UsageError, match="floating point, not torch"):
            lookup(index, held, 2, torch.int32)


def test_bits_that_only_some_of_the_weights_have_are_refused():
    packed = BlockedWeight.pack(make())
    fewer = BlockedWeight.pack(random_weight(N, K, (2,)))
    for bits in (4, torch.tensor([2, 4])):
        with pytest.raises(UnsupportedBitsError):
            prepared_linear(torch.randn(2, K), [packed, fewer], bits)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (7,), (2, 3), (6, 1)], ids=str)
def test_row_bits_must_have_one_entry_a_row(shape):
    packed, x = BlockedWeight.pack(make()), torch.randn(2, 3, K)
    with pytest.raises(ValueError, match=r"row_bits must have shape \[6\]"):
        prepared_linear(x, [packed], torch.full(shape, 2))
    with pytest.raises(ValueError, match=r"row_bits must have shape \[6\]"):
        plane_linear_rows(x, make(), torch.full(shape, 2))
    with pytest.raises(ValueError, match=r"row_bits must have shape \[6\]"):
        torch.ops.bitstrata.prepared_linear_rows(*arguments(packed, x, torch.full(shape, 2)))


@pytest.mark.parametrize("bits", [258, 2 + 2**32], ids=str)
def test_row_bits_are_not_cut_to_a_byte(bits):
    """258 is 2 in int8."""
    packed = BlockedWeight.pack(make())
    with pytest.raises(UnsupportedBitsError):
        prepared_linear(torch.randn(2, K), [packed], torch.tensor([2, bits]))


@pytest.mark.parametrize("columns", [1, K - 1, K + 1, 96, 64], ids=lambda k: f"{k}-columns")
def test_activations_of_the_wrong_width_are_refused(columns):
    """Also where the padded weight, or the number of words and groups, would fit."""
    packed, x = BlockedWeight.pack(make()), torch.randn(2, columns)
    for bits in (2, torch.tensor([2, 2])):
        with pytest.raises(ValueError, match=rf"expected x \[\.\.\., 70\], got \[2, {columns}\]"):
            prepared_linear(x, [packed], bits)
    for call in (lambda: plane_linear(x, make(), 2), lambda: plane_linear_rows(x, make(), torch.tensor([2, 2]))):
        with pytest.raises(ValueError, match=rf"expected x \[\.\.\., 70\], got \[2, {columns}\]"):
            call()


def test_weights_of_different_groups_do_not_share_a_call():
    one, other = BlockedWeight.pack(make()), BlockedWeight.pack(random_weight(N, K, BITS, group_size=64))
    with pytest.raises(ValueError, match="equal columns and groups"):
        prepared_linear(torch.randn(2, K), [one, other], 2)


def test_weights_and_activations_are_left_alone():
    packed, x = BlockedWeight.pack(make()), torch.randn(3, K)
    tensors = [x, *packed.planes, *packed.scales.values()]
    before = [t.clone() for t in tensors]
    prepared_linear(x, [packed], 4)
    prepared_linear(x, [packed], torch.tensor([2, 4, 2]))
    for old, new in zip(before, tensors, strict=True):
        assert torch.equal(old, new)


def test_autocast_does_not_change_the_dtype_of_the_result():
    packed, x = BlockedWeight.pack(make()), torch.randn(20, K)
    rows = torch.arange(20) % 3 * 2 + 2
    stored = plane_linear(x, make(), 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plane_linear(x, make(), 4), stored)
        uniform, mixed = prepared_linear(x, [packed], 4)[0], prepared_linear(x, [packed], rows)[0]
        op = torch.ops.bitstrata.prepared_linear(*arguments(packed, x, 4))
    assert torch.equal(uniform, prepared_linear(x, [packed], 4)[0])
    assert torch.equal(op, uniform)
    assert torch.equal(mixed, prepared_linear(x, [packed], rows)[0])


def test_a_tracer_sees_the_op_and_not_the_memory_it_fills():
    packed, x = BlockedWeight.pack(make()), torch.randn(3, K)
    graph = make_fx(lambda t: prepared_linear(t, [packed], 4)[0])(x)
    assert "bitstrata.prepared_linear" in graph.code
    other = torch.randn(3, K)
    assert torch.equal(graph(other), prepared_linear(other, [packed], 4)[0])


def test_the_gradient_is_that_of_the_decoded_weight():
    weight, x = make(), torch.randn(3, K, requires_grad=True)
    packed = BlockedWeight.pack(weight)
    for y in (prepared_linear(x, [packed], 4)[0], torch.ops.bitstrata.prepared_linear(*arguments(packed, x, 4))):
        (found,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(found.double(), decode(weight, 4, torch.float64).sum(0).expand(3, K))
    with torch.no_grad():
        assert not prepared_linear(x, [packed], 4)[0].requires_grad
