"""Derivatives with respect to activations are those of a dense layer with the decoded weight, in float64.

Products are linear in x, so every derivative is a product with the decoded weight: the forward pass may quantize
activations, derivatives are exact. What cannot be differentiated is refused in words.
"""

from __future__ import annotations

import pytest
import torch
from helpers import assert_linear_close, random_weight
from instruction_sets import BEST
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from bitstrata.errors import UsageError
from bitstrata.kernels import linear_many, ops, pack, registry
from bitstrata.kernels.cpu import missing
from bitstrata.kernels.reference import StoredWeight
from bitstrata.kernels.triton import KERNEL, TiledWeight
from bitstrata.planes import PlaneWeight, decode

N, K = 37, 70
BITS = tuple(range(1, 9))
ROWS = (1, 9, 16, 17, 40)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
scales = pytest.mark.parametrize("scales", ["affine", "affine8", "codebook"])
native = pytest.mark.skipif(bool(missing), reason="the native kernels are not built")


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Layer:
    """A weight as one of the layouts holds it; called with x and bits, an int or one a row."""

    def __init__(self, weight: PlaneWeight, layout: str, kernel: str = "") -> None:
        self.weight = weight
        kernel = kernel or {"stored": "reference", "blocked": BEST, "tiled": KERNEL.name}[layout]
        self.packed = TiledWeight.pack(weight, KERNEL) if layout == "tiled" else pack(weight, kernel=kernel)

    def __call__(self, x: Tensor, bits: int | Tensor) -> Tensor:
        return self.packed.linear(x, bits)

    def dense(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """What a dense layer makes of x, in float64: the function whose derivatives are the right ones."""
        x = x.double()
        if isinstance(bits, int):
            return x @ decode(self.weight, bits, torch.float64).T
        rows = x.reshape(-1, x.shape[-1])
        each = torch.stack([decode(self.weight, value, torch.float64) for value in bits.tolist()])  # [rows, N, K]
        return torch.einsum("rk,rnk->rn", rows, each).view(*x.shape[:-1], -1)


@pytest.fixture(params=["stored", pytest.param("blocked", marks=native), "tiled"])
def layout(request, monkeypatch):
    """Where no GPU is, only the interpreter could run the kernels of the tiled layout: the reference stands in."""
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    if request.param == "tiled":
        instead_of_triton(monkeypatch)
    return request.param


def instead_of_triton(monkeypatch) -> None:
    def multiply(x, weights, bits, kernel):
        stored = [StoredWeight(weight.stored()) for weight in weights]
        return StoredWeight.multiply(x, stored, bits, kernel)

    monkeypatch.setattr(TiledWeight, "multiply", staticmethod(multiply))
    monkeypatch.setattr(TiledWeight, "rows", lambda self, *given: StoredWeight(self.stored()).rows(*given))
    monkeypatch.setattr(registry, "of_layout", lambda layout, name, device: registry._KERNELS[name])


def some_bits(kind: str, rows: int) -> int | Tensor:
    return 3 if kind == "int" else torch.tensor([2, 5, 3, 8])[torch.arange(rows) % 4]


kinds = pytest.mark.parametrize("kind", ["int", "rows"])


def assert_gradient(found: Tensor | None, gradient: Tensor, layer: Layer, bits: int | Tensor, label: str) -> None:
    """found = gradient @ W, row by row at its bits, with at most twice the error of a dense layer in this dtype."""
    assert found is not None, f"{label}: no gradient"
    values = [bits] * len(gradient) if isinstance(bits, int) else bits.tolist()
    for value in sorted(set(values)):
        at = torch.tensor([v == value for v in values])
        W = decode(layer.weight, value, torch.float64)
        assert_linear_close(found[at], gradient[at], W.T, f"{label} bits={value}")


@pytest.mark.filterwarnings("ignore:.*unpacked at every call")
@scales
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_every_bits_and_row_count(layout, scales, dtype, seed):
    layer = Layer(random_weight(N, K, BITS, 32, scales, seed), layout)
    for rows in ROWS:
        for bits in (*BITS, torch.tensor(BITS)[torch.arange(rows) * 3 % 8]):
            x, g = normal(seed, rows, K, dtype=dtype).requires_grad_(), normal(seed + 1, rows, N, dtype=dtype)
            y = layer(x, bits)
            with torch.no_grad():
                assert torch.equal(y, layer(x, bits)), "the result with a gradient is the one without"
            y.backward(g)
            assert_gradient(x.grad, g, layer, bits, f"{dtype} rows={rows}")


@native
@kinds
@pytest.mark.parametrize("rows", [8, 40])
def test_weights_of_several_tiles(kind, rows, seed, monkeypatch):
    """Tiles of the decoded weight are overwritten by the next ones: nothing that backward needs may be in them."""
    monkeypatch.setattr(ops, "TILE_WEIGHTS", 16 * K)
    monkeypatch.setattr("bitstrata.kernels.cpu.blocked.TILE_WEIGHTS", 16 * K)
    layer = Layer(random_weight(N, K, BITS, 32, seed=seed), "blocked")
    x, g, bits = normal(seed, rows, K).requires_grad_(), normal(seed + 1, rows, N), some_bits(kind, rows)
    layer(x, bits).backward(g)
    assert_gradient(x.grad, g, layer, bits, f"rows={rows}")


@native
@pytest.mark.parametrize("rows", [8, 40])
def test_a_weight_as_large_as_those_of_a_model(rows, seed):
    layer = Layer(random_weight(2050, 4096, (4,), 128, seed=seed), "blocked")
    assert ops.TILE_WEIGHTS < 2050 * 4096
    x, g = normal(seed, rows, 4096).requires_grad_(), normal(seed + 1, rows, 2050)
    layer(x, 4).backward(g)
    assert_gradient(x.grad, g, layer, 4, f"rows={rows}")


@native
@kinds
def test_weights_that_share_a_call(kind, seed):
    layers = [Layer(random_weight(n, K, BITS, 32, seed=seed + n), "blocked") for n in (5, 37, 16)]
    x, bits = normal(seed, 2, 3, K).requires_grad_(), some_bits(kind, 6)
    gs = [normal(seed + n, 2, 3, n) for n in (5, 37, 16)]
    ys = linear_many(x, [layer.packed for layer in layers], bits)
    torch.autograd.backward(ys, gs)
    other = x.detach().double().requires_grad_()
    torch.autograd.backward([layer.dense(other, bits) for layer in layers], [g.double() for g in gs])
    torch.testing.assert_close(x.grad.double(), other.grad, rtol=1e-5, atol=1e-4)


# f(x) -> a number, from f: a layer's function
def loss(y: Tensor) -> Tensor:
    return (y.double() ** 3).sum() / 100


@pytest.fixture
def exact(layout):
    """exact(weight) -> a Layer whose activations are not quantized: derivatives of curved functions can be compared."""
    return lambda weight: Layer(weight, layout, "scalar-exact" if layout == "blocked" else "")


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: loss(f(x)))(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "jvp": lambda f, x: torch.func.jvp(lambda x: f(x) ** 2, (x,), (x.cos(),))[1],
    "jacrev": lambda f, x: torch.func.jacrev(lambda x: f(x) ** 2)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(lambda x: f(x) ** 2)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: loss(f(x)))(x),
    "grad-of-grad": lambda f, x: torch.func.grad(lambda x: torch.func.grad(lambda x: loss(f(x)))(x).square().sum())(x),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](x.cos()),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "dual numbers": lambda f, x: _tangent(f, x),
    "autograd twice": lambda f, x: _twice(f, x),
}


def _tangent(f, x):
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos())) ** 2).tangent
        assert tangent is not None
        return tangent


def _twice(f, x):
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(loss(f(x)), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


@pytest.mark.filterwarnings("ignore:.*unpacked at every call", "ignore:.*get_attr Node")
@kinds
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(exact, transform, kind, seed):
    layer, x, bits = exact(random_weight(5, K, BITS, 32, seed=seed)), normal(seed, 3, K), some_bits(kind, 3)
    found = TRANSFORMS[transform](lambda x: layer(x, bits), x)
    expected = TRANSFORMS[transform](lambda x: layer.dense(x, bits), x.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.filterwarnings("ignore:.*unpacked at every call")
@kinds
def test_derivatives_of_every_order_as_torch_checks_them(layout, kind, seed):
    layer, bits = Layer(random_weight(3, 5, BITS, 32, seed=seed), layout), some_bits(kind, 2)
    x = normal(seed, 2, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x, bits), x, check_forward_ad=True)
    square = lambda x: layer(x, bits) ** 2  # noqa: E731
    assert torch.autograd.gradgradcheck(square, x, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.filterwarnings("ignore:.*unpacked at every call")
@pytest.mark.parametrize("at", [0, 1, 2])
def test_vmap_over_any_dimension(exact, at, seed):
    layer, x = exact(random_weight(5, K, BITS, 32, seed=seed)), normal(seed, 4, 3, 2, K)
    assert torch.equal(torch.vmap(lambda x: layer(x, 3), at)(x), layer(x.movedim(at, 0), 3))
    rows = x.movedim(at, 0)[0, ..., 0].numel()
    bits = torch.tensor([2, 5, 8])[torch.arange(rows) % 3]
    together = layer(x.movedim(at, 0), bits.repeat(x.shape[at]))
    assert torch.equal(torch.vmap(lambda x: layer(x, bits), at)(x), together)


@native
def test_vmap_over_bits_and_over_rows_with_their_bits(seed):
    layer, x = Layer(random_weight(5, K, BITS, 32, seed=seed), "blocked"), normal(seed, 4, 3, K)
    bits = torch.randint(1, 9, (4, 3), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(torch.vmap(layer)(x, bits), layer(x, bits.flatten()))
    expected = torch.stack([layer(x[0], each) for each in bits])
    assert torch.equal(torch.vmap(lambda bits: layer(x[0], bits))(bits), expected)


def test_vmap_over_lookups(layout, seed):
    layer, index = Layer(random_weight(N, K, BITS, 32, seed=seed), layout), torch.tensor([[3, 36, 0], [1, 1, 20]])

    def rows(index):
        return layer.packed.lookup(index, 3, torch.float32)

    expected = decode(layer.weight, 3)[index]
    assert torch.equal(torch.vmap(rows)(index), expected)
    assert torch.equal(torch.vmap(rows, 1)(index), expected.transpose(0, 1))


@pytest.mark.filterwarnings("ignore:.*unpacked at every call")
@kinds
@pytest.mark.parametrize("again", ["eager", "compiled", "compiled, of torch.func.grad"])
def test_compiled(exact, again, kind, seed):
    layer, bits = exact(random_weight(5, K, BITS, 32, seed=seed)), some_bits(kind, 3)
    torch._dynamo.reset()

    def wrap(f):
        return torch.compile(f, backend="aot_eager", fullgraph=True)

    def f(x):
        return loss(layer(x, bits))

    for step in range(2):
        x = normal(seed + step, 3, K).requires_grad_()
        other = x.detach().double().requires_grad_()
        loss(layer.dense(other, bits)).backward()
        if again == "compiled, of torch.func.grad":
            found = wrap(torch.func.grad(f))(x.detach())
        else:
            (wrap(f) if again == "compiled" else f)(x).backward()
            found = x.grad
        torch.testing.assert_close(found.double(), other.grad, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@native
@kinds
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rows", [3, 20])
def test_checkpointing(reentrant, kind, rows, seed):
    layer, bits = Layer(random_weight(N, K, BITS, 32, seed=seed), "blocked"), some_bits(kind, rows)
    x, g = normal(seed, rows, K).requires_grad_(), normal(seed + 1, rows, N)
    checkpoint(layer, x, bits, use_reentrant=reentrant).backward(g)
    assert_gradient(x.grad, g, layer, bits, f"rows={rows}")


@native
@kinds
@pytest.mark.parametrize("rows", [3, 20])
def test_under_autocast(kind, rows, seed):
    layer, bits = Layer(random_weight(N, K, BITS, 32, seed=seed), "blocked"), some_bits(kind, rows)
    x, g = normal(seed, rows, K).requires_grad_(), normal(seed + 1, rows, N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, bits)
        assert y.dtype == torch.float32, "the result has x's dtype"
        y.backward(g)
    assert_gradient(x.grad, g, layer, bits, f"rows={rows}")


@native
def test_a_gradient_that_is_not_there_is_zero_and_one_in_pieces_is_whole(seed):
    """Gradients come as expanded, lazily zero or negated tensors."""
    layer, x = Layer(random_weight(N, K, BITS, 32, seed=seed), "blocked"), normal(seed, 3, K).requires_grad_()
    W = decode(layer.weight, 3, torch.float64)
    layer(x, 3).sum().backward()
    torch.testing.assert_close(x.grad.double(), W.sum(0).expand(3, K), rtol=1e-5, atol=1e-4)
    for g in (torch._efficientzerotensor((3, N)), torch._neg_view(normal(seed + 1, 3, N))):
        (found,) = torch.autograd.grad(layer(x, 3), x, g)
        torch.testing.assert_close(found.double(), (g + torch.zeros(())).double() @ W, rtol=1e-5, atol=1e-4)


@native
def test_no_weight_is_held_for_the_backward_pass(seed):
    """In gigabytes a model's decoded weights: what stays between the passes is planes alone."""
    layer, x = Layer(random_weight(512, 512, (4,), 128, seed=seed), "blocked"), normal(seed, 40, 512).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = layer(x, 4)
    assert kept == []
    y.sum().backward()
    assert_gradient(x.grad, torch.ones(40, 512), layer, 4, "")


def test_derivatives_of_scales_are_refused(seed):
    weight, x = random_weight(N, K, BITS, 32, seed=seed), normal(seed, 3, K)
    stored = pack(weight, kernel="reference")
    weight.scales[3].scale.requires_grad_()
    for call in (
        lambda: stored.linear(x, 3),
        lambda: stored.linear(x.requires_grad_(), 3),
        lambda: stored.linear(x, torch.tensor([2, 3, 4])),
        lambda: stored.lookup(torch.tensor([1]), 3, torch.float32),
        lambda: pack(weight),
    ):
        with pytest.raises(UsageError, match="derivatives with respect to the scales"):
            call()
        with torch.no_grad():
            call()
    torch.testing.assert_close(stored.linear(x, 2), x @ decode(weight, 2).T)


@native
def test_what_cannot_be_mapped_is_refused_in_words(seed):
    layer = Layer(random_weight(5, K, BITS, 32, seed=seed), "stored")
    x, scale = normal(seed, 3, K).requires_grad_(), layer.weight.scales[3].scale
    with pytest.raises(UsageError, match=r"is_grads_batched=True") as caught:
        torch.autograd.grad(layer(x, 3), x, torch.ones(2, 3, 5), is_grads_batched=True)
    assert "torch.func" in caught.value.hint

    def with_scale(scale):
        planes, (_, offset), *rest = layer.packed.arguments(3)
        return torch.ops.bitstrata.linear(x.detach(), planes, [scale, offset], *rest, 3, None)

    with pytest.raises(UsageError, match="vmap cannot map over a quantized weight"):
        torch.vmap(with_scale)(torch.stack([scale, scale]))
    with pytest.raises(UsageError, match="derivatives with respect to the scales"):
        torch.func.jvp(with_scale, (scale,), (scale,))
