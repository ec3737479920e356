"""The operations on weights in each layout: as torch ops, as functions, and what they refuse."""

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
from bitstrata.kernels import Weight, linear_many, ops, registry
from bitstrata.kernels import pack as pack_for
from bitstrata.kernels.cpu import missing
from bitstrata.planes import decode

N, K = 5, 70
BITS = (2, 4, 6)
OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

scales = pytest.mark.parametrize("scales", ["affine", "affine8", "codebook"])
mixed = pytest.mark.parametrize("mixed", [False, True], ids=["uniform", "rows"])
native = pytest.mark.skipif(bool(missing), reason="the native kernels are not built")
linear = torch.ops.bitstrata.linear


@pytest.fixture(params=[pytest.param("scalar", marks=native, id="blocked"), pytest.param("reference", id="stored")])
def pack(request):
    """pack(weight) for a kernel of each layout."""
    return lambda weight: pack_for(weight, kernel=request.param)


def make(scales="affine"):
    return random_weight(N, K, BITS, kind=scales)


def arguments(packed: Weight, x, bits):
    """The arguments of the op as the dispatcher gets them; `bits` an int or a tensor."""
    rows = isinstance(bits, torch.Tensor)
    return (x, *packed.arguments(bits), 0 if rows else bits, bits if rows else None)


def bits_for(mixed, x):
    rows = x.shape[:-1].numel()
    return torch.tensor(BITS)[torch.arange(rows) % len(BITS)] if mixed else 4


@mixed
@scales
@pytest.mark.parametrize("shape", [(3,), (2, 3), (1,), (17,)], ids=str)
def test_opcheck(pack, scales, shape, mixed):
    x = torch.randn(*shape, K)
    bits = bits_for(mixed, x)
    torch.library.opcheck(linear.default, arguments(pack(make(scales)), x, bits), test_utils=OPCHECK)


@mixed
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (0,), (4, 0), ()], ids=str)
def test_fakes_tell_the_shape_dtype_and_strides_of_the_result(pack, shape, dtype, mixed):
    x = torch.randn(*shape, K).to(dtype)
    bits = bits_for(mixed, x)
    packed = pack(make())
    real = linear(*arguments(packed, x, bits))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = linear(*arguments(packed, mode.from_tensor(x), bits))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, dtype, real.stride())
    assert real.shape == (*shape, N)


@scales
@pytest.mark.parametrize("kernel", ["scalar", "scalar-int8", "scalar-exact", "reference"])
def test_op_and_function_agree(kernel, scales, seed):
    """The same kernel on the same bits: equal to the last one."""
    if missing and kernel != "reference":
        pytest.skip(missing)
    packed = pack_for(random_weight(N, K, BITS, kind=scales, seed=seed), kernel=kernel)
    for rows in (1, 6, 20):
        x = torch.randn(rows, K)
        for mixed in (False, True):
            bits = bits_for(mixed, x)
            assert torch.equal(linear(*arguments(packed, x, bits)), packed.linear(x, bits))


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
def test_non_contiguous_activations(pack, kind, seed):
    x, packed = non_contiguous(kind, seed), pack(make())
    assert not x.is_contiguous()
    for mixed in (False, True):
        bits = bits_for(mixed, x)
        expected = packed.linear(x.contiguous(), bits)
        torch.testing.assert_close(packed.linear(x, bits), expected)
        assert torch.equal(linear(*arguments(packed, x, bits)), packed.linear(x, bits))


@pytest.mark.parametrize("leading", [(0,), (0, 4), (4, 0)], ids=str)
def test_no_rows(pack, leading):
    packed, x = pack(make()), torch.randn(*leading, K)
    for bits in (4, torch.zeros(0, dtype=torch.int8)):
        for y in linear_many(x, [packed, packed], bits):
            assert y.shape == (*leading, N)


UNPACKED = "unpacked at every call, which is slow"


@native
@mixed
def test_float64_goes_to_a_kernel_that_can_and_says_what_it_costs(mixed, seed):
    weight = random_weight(N, K, BITS, seed=seed)
    x = torch.randn(6, K, dtype=torch.float64)
    bits = bits_for(mixed, x)
    packed = pack_for(weight, kernel="scalar")
    with pytest.warns(UserWarning, match=rf"activations in torch.float64: kernel 'reference'.*{UNPACKED}.*float32"):
        y = packed.linear(x, bits)
    with pytest.warns(UserWarning, match=UNPACKED):
        rows = packed.lookup(torch.arange(N), 4, torch.float64)
    assert torch.equal(rows, decode(weight, 4, torch.float64))
    row_bits = bits if mixed else torch.full((6,), bits)
    for value in row_bits.unique().tolist():
        rows = row_bits == value
        promise_of(registry._KERNELS["reference"], weight, value)(y[rows], x[rows], "float64")


@native
def test_a_slow_call_is_said_once_and_a_fast_one_never():
    packed, x = pack_for(make(), kernel="scalar"), torch.randn(6, K)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for dtype in DTYPES:
            packed.linear(x.to(dtype), 4)
            packed.lookup(torch.arange(N), 4, dtype)
        assert seen == []
        for _ in range(3):
            linear_many(x.double(), [packed, packed], 4)
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64], ids=str)
def test_activations_that_are_not_floating_point_have_no_kernel(pack, dtype):
    packed, x = pack(make()), torch.ones(2, K).to(dtype)
    for bits in (2, torch.tensor([2, 4])):
        with pytest.raises(KernelError):
            packed.linear(x, bits)


@scales
@pytest.mark.parametrize("bits", [0, 1, 3, 5, 8, -1])
def test_bits_without_a_scales_are_refused(pack, scales, bits):
    packed, x = pack(make(scales)), torch.randn(2, K)
    with pytest.raises(UnsupportedBitsError) as caught:
        packed.linear(x, bits)
    assert caught.value.hint == "supported bits: 2, 4, 6"
    with pytest.raises(UnsupportedBitsError, match=rf"\[{bits}\]"):
        packed.linear(x, torch.tensor([2, bits]))
    with pytest.raises(UnsupportedBitsError):
        linear(*arguments(packed, x, 2)[:-2], bits, None)


@pytest.mark.parametrize("bits", [2.0, True, "2", None, [2], np.float64(2), np.bool_(True)], ids=repr)
def test_bits_that_are_no_integer_are_refused(pack, bits):
    weight, x = random_weight(N, K, (1, 2)), torch.randn(2, K)
    packed = pack(weight)
    for call in (
        lambda: packed.linear(x, bits),
        lambda: packed.lookup(torch.tensor([1]), bits, torch.float32),
    ):
        with pytest.raises(UsageError, match="bits must be an int, got"):
            call()


@pytest.mark.parametrize("kind", [np.int64, np.int8, np.uint8])
def test_integers_of_numpy_are_bits(pack, kind, seed):
    weight, x = random_weight(N, K, BITS, seed=seed), torch.randn(2, K)
    packed, index = pack(weight), torch.tensor([1, 4])
    assert torch.equal(packed.linear(x, kind(4)), packed.linear(x, 4))
    assert torch.equal(packed.lookup(index, kind(4), torch.float32), decode(weight, 4)[index])
    with pytest.raises(UnsupportedBitsError):
        packed.linear(x, kind(3))


@pytest.mark.parametrize(
    "bits",
    [torch.tensor([2.0, 2.0]), torch.tensor([True, True]), torch.tensor([2 + 0j, 2])],
    ids=["float", "bool", "complex"],
)
def test_row_bits_that_are_no_integers_are_refused(pack, bits):
    packed, x = pack(random_weight(N, K, (1, 2))), torch.randn(2, K)
    with pytest.raises(UsageError, match="row_bits must be an integer tensor, got torch"):
        packed.linear(x, bits)


@pytest.mark.parametrize("bits", [2, torch.tensor([2, 2])], ids=["int", "rows"])
def test_activations_that_are_no_rows_are_refused(pack, bits):
    packed = pack(make())
    for x, message in (
        (torch.tensor(1.0), r"expected x \[\.\.\., 70\], got \[\]"),
        (torch.ones(2, K).to_sparse(), "x must be dense"),
        ([1.0] * K, "x must be a tensor, got list"),
        (np.ones((2, K)), "x must be a tensor, got ndarray"),
    ):
        with pytest.raises(UsageError, match=message):
            packed.linear(x, bits)


@pytest.mark.parametrize("index", [torch.tensor([1.7]), torch.tensor([True]), [1]], ids=["float", "bool", "list"])
def test_an_index_that_is_no_integer_is_refused(pack, index):
    with pytest.raises(UsageError, match="index must be an integer tensor"):
        pack(make()).lookup(index, 2, torch.float32)


def test_a_lookup_refuses_bits_and_dtypes_that_there_are_not(pack):
    packed, index = pack(make()), torch.tensor([1])
    with pytest.raises(UnsupportedBitsError):
        packed.lookup(index, 3, torch.float32)
    with pytest.raises(UsageError, match="floating point, not torch"):
        packed.lookup(index, 2, torch.int32)


def test_bits_that_only_some_of_the_weights_have_are_refused(pack):
    packed = pack(make())
    fewer = pack(random_weight(N, K, (2,)))
    for bits in (4, torch.tensor([2, 4])):
        with pytest.raises(UnsupportedBitsError):
            linear_many(torch.randn(2, K), [packed, fewer], bits)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (7,), (2, 3), (6, 1)], ids=str)
def test_row_bits_must_have_one_entry_a_row(pack, shape):
    packed, x = pack(make()), torch.randn(2, 3, K)
    with pytest.raises(ValueError, match=r"row_bits must have shape \[6\]"):
        packed.linear(x, torch.full(shape, 2))
    with pytest.raises(ValueError, match=r"row_bits must have shape \[6\]"):
        linear(*arguments(packed, x, torch.full(shape, 2)))


@pytest.mark.parametrize("bits", [258, 2 + 2**32], ids=str)
def test_row_bits_are_not_cut_to_a_byte(pack, bits):
    """258 is 2 in int8."""
    packed = pack(make())
    with pytest.raises(UnsupportedBitsError):
        packed.linear(torch.randn(2, K), torch.tensor([2, bits]))


@pytest.mark.parametrize("columns", [1, K - 1, K + 1, 96, 64], ids=lambda k: f"{k}-columns")
def test_activations_of_the_wrong_width_are_refused(pack, columns):
    """Also where the padded weight would be as wide."""
    packed, x = pack(make()), torch.randn(2, columns)
    for bits in (2, torch.tensor([2, 2])):
        with pytest.raises(ValueError, match=rf"expected x \[\.\.\., 70\], got \[2, {columns}\]"):
            packed.linear(x, bits)


@native
def test_weights_of_different_groups_do_not_share_a_call():
    one, other = (pack_for(random_weight(N, K, BITS, group_size=size), kernel="scalar") for size in (32, 64))
    with pytest.raises(ValueError, match="equal columns and groups"):
        linear_many(torch.randn(2, K), [one, other], 2)


def test_weights_and_activations_are_left_alone(pack):
    packed, x = pack(make()), torch.randn(3, K)
    tensors = [x, *packed.planes, *packed.arguments(torch.tensor([]))[1]]
    before = [t.clone() for t in tensors]
    packed.linear(x, 4)
    packed.linear(x, torch.tensor([2, 4, 2]))
    for old, new in zip(before, tensors, strict=True):
        assert torch.equal(old, new)


def test_autocast_does_not_change_the_dtype_of_the_result(pack):
    packed, x = pack(make()), torch.randn(20, K)
    rows = torch.arange(20) % 3 * 2 + 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        uniform, mixed = packed.linear(x, 4), packed.linear(x, rows)
        op = linear(*arguments(packed, x, 4))
    assert torch.equal(uniform, packed.linear(x, 4))
    assert torch.equal(op, uniform)
    assert torch.equal(mixed, packed.linear(x, rows))


def test_a_tracer_sees_the_op_and_not_the_memory_it_fills(pack):
    packed, x = pack(make()), torch.randn(3, K)
    graph = make_fx(lambda t: packed.linear(t, 4))(x)
    assert "bitstrata.linear" in graph.code
    other = torch.randn(3, K)
    assert torch.equal(graph(other), packed.linear(other, 4))


def test_the_gradient_is_that_of_the_decoded_weight(pack):
    weight, x = make(), torch.randn(3, K, requires_grad=True)
    packed = pack(weight)
    for y in (packed.linear(x, 4), linear(*arguments(packed, x, 4))):
        (found,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(found.double(), decode(weight, 4, torch.float64).sum(0).expand(3, K))
    with torch.no_grad():
        assert not packed.linear(x, 4).requires_grad


def test_the_meta_device_is_enough_to_trace_shapes(pack):
    packed = pack(make())
    meta = arguments(packed, torch.empty(2, 3, K, device="meta", dtype=torch.bfloat16), 4)
    moved = [[t.to("meta") for t in a] if isinstance(a, list) and a and torch.is_tensor(a[0]) else a for a in meta]
    y = linear(*moved)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 3, N), torch.bfloat16)


def test_activations_elsewhere_than_the_weight_are_refused(pack):
    packed = pack(make())
    with pytest.raises(UsageError, match="activations on meta"):
        ops._linear(*arguments(packed, torch.empty(2, K, device="meta"), 4))


def test_higher_planes_are_not_handed_to_the_op(pack):
    packed = pack(make())
    assert len(packed.arguments(2)[0]) == 2
    assert len(packed.arguments(torch.tensor([2]))[0]) == 6
