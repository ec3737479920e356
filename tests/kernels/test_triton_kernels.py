"""The Triton kernels against float64 and the reference, on a GPU, or in Triton's interpreter.

Without a GPU these run in processes of their own, which test_triton_interpreter.py starts: the interpreter must be
chosen before a kernel is compiled, and must not be what other tests see.
"""

from __future__ import annotations

import os

import pytest
import torch
from helpers import assert_linear_close, random_weight

from bitstrata.kernels import pack
from bitstrata.kernels.triton import KERNEL, TiledWeight
from bitstrata.planes import decode

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
pytestmark = [
    pytest.mark.skipif(
        DEVICE == "cpu" and not INTERPRETED,
        reason="no CUDA device; test_triton_interpreter.py runs these in the interpreter",
    ),
    pytest.mark.usefixtures("poisoned", "forced"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]

N, K = 19, 269
ROWS = (1, 2, 7, 8, 9, 16, 17, 33)
FEW_ROWS = 16
ALL_BITS = tuple(range(1, 9))
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = {
    "group-12": ("affine", 12),
    "group-32": ("affine", 32),
    "group-43": ("affine", 43),
    "group-64": ("affine", 64),
    "group-128": ("affine", 128),
    "group-K": ("affine", K),
    "bytes-64": ("affine8", 64),
    "bytes-200": ("affine8", 200),
    "codebook": ("codebook", K),
}
if INTERPRETED:  # which takes a second for what takes a GPU nothing
    LAYOUTS = {name: LAYOUTS[name] for name in ("group-12", "group-43", "bytes-64", "codebook")}
    ALL_BITS = (1, 3, 4, 6, 8)
layouts = pytest.mark.parametrize(("scales", "group_size"), LAYOUTS.values(), ids=LAYOUTS.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


@pytest.fixture
def forced(monkeypatch):
    monkeypatch.setenv("BITSTRATA_KERNEL", "triton")


def make(kind, group_size, seed, bits=ALL_BITS, n=N, k=K):
    """A weight as stored, on the CPU, and tiled, on the device."""
    weight = random_weight(n, k, bits, group_size, kind, seed)
    tiled = TiledWeight.pack(weight, KERNEL)
    planes = tuple(plane.to(DEVICE) for plane in tiled.planes)
    scales = {value: tensor.to(DEVICE) for value, tensor in tiled.scales.items()}
    return weight, TiledWeight(planes, scales, n, k, group_size, tiled.kind, KERNEL)


def activations(rows, dtype, seed, k=K):
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(x, tiled, bits):
    """On the device, and back."""
    bits = bits.to(DEVICE) if isinstance(bits, torch.Tensor) else bits
    return tiled.linear(x.to(DEVICE), bits).cpu()


def check(y, x, weight, bits, label):
    assert_linear_close(y, x, decode(weight, bits, torch.float64), f"{label} bits={bits} rows={len(x)} {x.dtype}")


@layouts
def test_all_bits_at_every_number_of_rows(scales, group_size, seed):
    """Every bits and every number of rows; which meet is the seed's."""
    weight, tiled = make(scales, group_size, seed)
    kinds = list(DTYPES.values())
    for at, bits in enumerate(ALL_BITS):
        rows, dtype = ROWS[(at + seed) % len(ROWS)], kinds[(at + seed // 8) % 3]
        x = activations(rows, dtype, seed + at)
        check(linear(x, tiled, bits), x, weight, bits, "uniform")


EACH_ROWS = [(scales, dtype) for scales in ("affine", "codebook") for dtype in DTYPES]


@pytest.mark.parametrize(("scales", "dtype"), EACH_ROWS[1::3] if INTERPRETED else EACH_ROWS)
def test_every_number_of_rows(scales, dtype, seed):
    weight, tiled = make(scales, 64, seed, (2, 3))
    dtype = DTYPES[dtype]
    for rows in ROWS:
        x = activations(rows, dtype, seed + rows)
        check(linear(x, tiled, 3), x, weight, 3, scales)


@layouts
def test_rows_at_their_own_bits_equal_all_rows_at_these(scales, group_size, seed):
    bits = (2, 3, 5)
    weight, tiled = make(scales, group_size, seed, bits)
    for rows, dtype in zip((3, 17), (torch.float16, torch.bfloat16), strict=True):
        x = activations(rows, dtype, seed + rows)
        row_bits = torch.tensor(bits)[torch.randint(3, (rows,), generator=torch.Generator().manual_seed(seed))]
        y = linear(x, tiled, row_bits.to(torch.int8))
        for value in row_bits.unique().tolist():
            chosen = row_bits == value
            check(y[chosen], x[chosen], weight, value, "mixed")
            if rows <= FEW_ROWS:
                assert torch.equal(y[chosen], linear(x, tiled, value)[chosen]), f"bits={value}"


@pytest.mark.parametrize("layout", ["group-43", "bytes-64", "codebook"])
def test_a_row_of_a_batch_equals_that_row_alone_and_twice(layout, seed):
    _, tiled = make(*LAYOUTS[layout], seed, (3,))
    x = activations(FEW_ROWS, torch.bfloat16, seed)
    together = linear(x, tiled, 3)
    for row in (0, 8, FEW_ROWS - 1):
        assert torch.equal(linear(x[row : row + 1], tiled, 3)[0], together[row])
    assert torch.equal(linear(x[2:9], tiled, 3), together[2:9])
    assert torch.equal(linear(x, tiled, 3), together)


@layouts
def test_decoding_is_exact(scales, group_size, seed):
    weight, tiled = make(scales, group_size, seed)
    index = torch.randint(N, (2, 5), generator=torch.Generator().manual_seed(seed))
    from bitstrata.kernels.triton import launch

    for at, bits in enumerate(ALL_BITS):
        dtype = list(DTYPES.values())[(at + seed) % 3]
        expected = decode(weight, bits, dtype)
        assert torch.equal(launch.decode(tiled, bits, dtype).cpu(), expected), f"{bits} {dtype}"
        assert torch.equal(tiled.lookup(index.to(DEVICE), bits, dtype).cpu(), expected[index])


@pytest.mark.parametrize("shape", [(1, 1), (1, 32), (3, 31), (8, 33), (16, 256), (17, 600)], ids=str)
@pytest.mark.parametrize("scales", ["affine", "affine8", "codebook"])
def test_widths_around_words_and_tiles(scales, shape, seed):
    n, k = shape
    weight, tiled = make(scales, 32, seed, (2, 4), n, k)
    for rows in (3, 17):
        x = activations(rows, torch.float16, seed, k)
        check(linear(x, tiled, 4), x, weight, 4, "shape")


@dtypes
@pytest.mark.parametrize("rows", [5, 17])
def test_large_activations_do_not_overflow(dtype, rows, seed):
    """Sums reach 1e4 * K, far above fp16; results that fit must come out."""
    weight, tiled = make("affine", 64, seed, (2,))
    x = activations(rows, torch.float32, seed).sign() * 1e4
    x[:, ::2] = x[:, 1::2].repeat(1, 2)[:, : x[:, ::2].shape[1]]
    y = linear(x.to(dtype), tiled, 2)
    exact = x.double() @ decode(weight, 2, torch.float64).T
    fits = exact.abs() < torch.finfo(dtype).max * 0.9
    assert fits.any()
    assert y[fits].isfinite().all()
    assert ((y[fits].double() - exact[fits]).abs() <= 2 * torch.finfo(dtype).eps * 1e4 * K).all()


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_a_row_that_is_not_finite_stays_alone(value, seed):
    _, tiled = make("affine", 43, seed, (2, 4))
    finite = torch.arange(7) != 4
    for dtype in DTYPES.values():
        x = activations(7, dtype, seed)
        x[4, 130] = value
        for bits in (4, torch.tensor([2, 4, 4, 2, 4, 2, 2]))[: 2 if dtype == torch.float16 else 1]:
            y = linear(x, tiled, bits)
            assert not y[4].isfinite().any()
            assert y[finite].isfinite().all()


def non_contiguous(kind, seed):
    x = activations(18, torch.float16, seed, 2 * K)
    return {
        "columns": lambda: x[:9, ::2],
        "rows": lambda: x[::2, :K],
        "overlapping": lambda: x.flatten()[1:].as_strided((9, K), (K - 2, 1)),
        "transposed": lambda: activations(K, torch.float16, seed, 9).T,
        "expanded": lambda: x[:1, :K].expand(9, K),
    }[kind]()


@pytest.mark.parametrize("kind", ["columns", "rows", "overlapping", "transposed", "expanded"])
def test_non_contiguous_activations(kind, seed):
    weight, tiled = make("affine", 64, seed, (3,))
    x = non_contiguous(kind, seed)
    there = x if DEVICE == "cpu" else x.to(DEVICE)
    assert not x.is_contiguous()
    check(tiled.linear(there, 3).cpu(), x, weight, 3, kind)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,), (4, 0)], ids=str)
def test_any_leading_dimensions(leading, seed):
    weight, tiled = make("affine", 64, seed, (3,))
    x = torch.randn(*leading, K, generator=torch.Generator().manual_seed(seed)).half()
    rows = x.shape[:-1].numel()
    for bits in (3, torch.full((rows,), 3)):
        y = linear(x, tiled, bits)
        assert y.shape == (*leading, N)
        check(y.reshape(rows, N), x.reshape(rows, K), weight, 3, "leading")


def test_bits_may_be_one_number_on_the_device_that_changes(seed):
    """What a captured graph needs: the same call, the same tensors, other bits."""
    weight, tiled = make("affine", 64, seed, (2, 4))
    x, bits = activations(4, torch.float16, seed), torch.tensor([2], dtype=torch.int32, device=DEVICE)
    for value in (2, 4):
        bits.fill_(value)
        check(linear(x, tiled, bits.expand(4)), x, weight, value, "device bits")


@pytest.mark.parametrize("scales", ["affine", "affine8", "codebook"])
def test_bits_that_the_host_did_not_see_and_nothing_has_become_nan(scales, seed):
    weight, tiled = make(scales, 64, seed, (2, 4))
    x = activations(3, torch.float16, seed)
    (y,) = tiled.multiply(x.to(DEVICE), [tiled], torch.tensor([2, 3, 4], dtype=torch.int8, device=DEVICE), KERNEL)
    assert y[1].isnan().all()
    check(y[::2][:1].cpu(), x[:1], weight, 2, "beside unknown bits")
    check(y[2:].cpu(), x[2:], weight, 4, "beside unknown bits")


def test_a_weight_is_packed_where_it_will_run(seed):
    weight = random_weight(N, K, (2, 3), 64, "affine", seed)
    packed, x = pack(weight, DEVICE, torch.float16), activations(2, torch.float16, seed)
    assert (packed.layout, packed.kernel.name) == ("tiled", "triton")
    check(packed.linear(x.to(DEVICE), 3).cpu(), x, weight, 3, "packed")


def test_a_compiler_sees_one_op(seed):
    _, tiled = make("affine", 64, seed, (2, 4))
    x = activations(3, torch.float16, seed).to(DEVICE)
    row_bits = torch.tensor([2, 4, 2], device=DEVICE)

    def both(x):
        return tiled.linear(x, 4) + tiled.linear(x, row_bits)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), both(x))


@pytest.mark.skipif(DEVICE != "cuda", reason="graphs are captured on CUDA devices")
def test_a_captured_graph_follows_new_bits(seed):
    weight, tiled = make("affine", 64, seed, (2, 4))
    x, row_bits = activations(4, torch.float16, seed), torch.full((4,), 2, dtype=torch.int32, device=DEVICE)
    there = x.to(DEVICE)
    tiled.linear(there, row_bits)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = tiled.linear(there, row_bits)
    for value in (2, 4):
        row_bits.fill_(value)
        graph.replay()
        check(y.cpu(), x, weight, value, "graph")
