"""Whoever wants to see an op sees it: right values in every state in which calls do not go straight to a kernel."""

from __future__ import annotations

import io
from contextlib import nullcontext

import pytest
import torch
from helpers import random_weight
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bitstrata.kernels import Weight, is_plain, pack, registry
from bitstrata.kernels.cpu import missing
from bitstrata.planes import decode

pytestmark = [
    pytest.mark.skipif(bool(missing), reason="the native kernels are not built"),
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python", "ignore:.*torch.jit.*deprecated"),
]
N, K = 37, 70
BITS = (2, 4, 6)
ROWS = (1, 2, 16, 17, 64)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def packed(seed, monkeypatch):
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    return pack(random_weight(N, K, BITS, 32, seed=seed))


class Model(torch.nn.Module):
    """A lookup, a product at 4 bits, and one with bits for each row."""

    def __init__(self, packed: Weight, rows: int) -> None:
        super().__init__()
        self.packed, self.bits = packed, torch.tensor(BITS)[torch.arange(rows) % 3]

    def forward(self, x: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        uniform = self.packed.linear(x, 4)
        mixed = self.packed.linear(x, self.bits)
        return self.packed.lookup(index, 2, torch.float32), uniform, mixed


def inputs(seed: int, rows: int) -> tuple[Tensor, Tensor]:
    return normal(seed, rows, K), torch.randint(N, (rows,), generator=torch.Generator().manual_seed(seed))


def traced(model: Model, example: tuple[Tensor, ...]) -> torch.nn.Module:
    return torch.jit.trace(model, example)


def saved_and_loaded(model: Model, example: tuple[Tensor, ...]) -> torch.nn.Module:
    file = io.BytesIO()
    torch.jit.save(traced(model, example), file)
    file.seek(0)
    return torch.jit.load(file)


RECORDERS = {
    "jit.trace": traced,
    "jit.trace, saved and loaded": saved_and_loaded,
    "make_fx": lambda model, example: make_fx(model)(*example),
    "export": lambda model, example: torch.export.export(model, example).module(),
    "export, strict": lambda model, example: torch.export.export(model, example, strict=True).module(),
    "compile": lambda model, example: torch.compile(model, backend="aot_eager", fullgraph=True),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("recorder", RECORDERS)
def test_recorded_graphs_give_the_values_of_other_inputs(packed, recorder, grad, seed):
    torch._dynamo.reset()
    for rows in ROWS:
        model, (x, index) = Model(packed, rows), inputs(seed, rows)
        with nullcontext() if grad else torch.no_grad():
            graph = RECORDERS[recorder](model, (x.requires_grad_(grad), index))
            for again in range(2):
                others = inputs(seed + again, rows)
                for found, expected in zip(graph(*others), model(*others), strict=True):
                    assert torch.equal(found, expected), f"rows={rows}"
    torch._dynamo.reset()


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Negating(TorchFunctionMode):
    """Changes what our ops return."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return -result if "bitstrata" in str(function) else result


class Marked(Tensor):
    """A subclass that keeps its kind through ops."""


def test_modes_and_subclasses_see_the_op(packed, seed):
    x, index = inputs(seed, 3)
    expected, rows = packed.linear(x, 4), decode(packed.stored(), 2)[index]
    with Counting() as mode:
        assert torch.equal(packed.linear(x, 4), expected)
        assert torch.equal(packed.lookup(index, 2, torch.float32), rows)
    assert mode.seen.count("bitstrata.linear.default") == 1
    assert mode.seen.count("bitstrata.lookup.default") == 1
    with Negating():
        assert torch.equal(packed.linear(x, 4), -expected)
        assert torch.equal(packed.lookup(index, 2, torch.float32), -rows)
    marked = packed.linear(x.as_subclass(Marked), 4)
    assert type(marked) is Marked
    assert torch.equal(marked.as_subclass(Tensor), expected)
    parameter = torch.nn.Parameter(x, requires_grad=False)
    assert torch.equal(packed.linear(parameter, 4), expected)


def test_values_that_torch_has_not_written_yet(packed, seed):
    x = normal(seed, 3, K)
    negative = torch.complex(x, x).conj().imag
    assert negative.is_neg()
    assert torch.equal(packed.linear(negative, 4), packed.linear(-x, 4))
    zeros = packed.linear(torch._efficientzerotensor((3, K)), 4)
    assert torch.equal(zeros, torch.zeros(3, N))
    bits = torch._neg_view(torch.tensor([-2, -4, -6], dtype=torch.int8))
    expected = packed.linear(x, torch.tensor([2, 4, 6]))
    assert torch.equal(packed.linear(x, bits), expected)


def test_ordinary_calls_go_straight_to_the_kernel(packed, seed, monkeypatch):
    """Also with a default device, inside no_grad, inference_mode and autocast: states that change no values."""
    (x, index), model = inputs(seed, 3), Model(packed, 3)
    expected = model(x, index)
    monkeypatch.delattr(torch.ops, "bitstrata")
    for state in (
        nullcontext(),
        torch.no_grad(),
        torch.inference_mode(),
        torch.device("meta"),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        with state:
            assert is_plain(x)
            assert all(map(torch.equal, model(x, index), expected))
    with torch.no_grad():
        assert all(map(torch.equal, model(x.clone().requires_grad_(), index), expected))


def test_no_other_state_is_plain(seed):
    x = normal(seed, 3, K)
    seen = {}

    def look(name):
        def f(x):
            seen[name] = is_plain(x)
            return x * 1

        return f

    torch.jit.trace(look("jit.trace"), x, check_trace=False)
    make_fx(look("make_fx"))(x)
    torch.func.vmap(look("vmap"))(x)
    torch.func.jvp(look("jvp"), (x,), (x,))
    torch.func.vjp(look("vjp"), x)
    torch.func.functionalize(look("functionalize"))(x)
    with forward_ad.dual_level():
        look("dual numbers")(forward_ad.make_dual(x, x))
    with FakeTensorMode() as mode:
        look("fake")(mode.from_tensor(x))
    with Counting():
        look("dispatch mode")(x)
    with Negating():
        look("function mode")(x)
    look("gradient")(x.clone().requires_grad_())
    look("parameter")(torch.nn.Parameter(x))
    look("lazily negated")(torch._neg_view(x))
    look("lazily zero")(torch._efficientzerotensor((3, K)))
    look("meta")(x.to("meta"))
    assert len(seen) == 15
    assert not any(seen.values()), seen
    assert is_plain(x)
