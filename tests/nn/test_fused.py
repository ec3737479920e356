"""Layers that share one call: results are those of separate calls, whatever happens in between."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import random_weight
from torch import nn

from bitstrata.errors import UnsupportedBitsError
from bitstrata.kernels import registry
from bitstrata.kernels.cpu import missing
from bitstrata.nn import BitsState, PlaneLinear, fuse, fused, use_bits
from bitstrata.planes import decode

pytestmark = pytest.mark.skipif(bool(missing), reason="the native kernels are not built")
BITS = (2, 3, 4)
K = 70
NAMES = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """Three layers of different sizes that read one input."""

    def __init__(self, seed: int, **changes) -> None:
        super().__init__()
        state = BitsState(dict.fromkeys(NAMES, BITS))
        for index, name in enumerate(NAMES):
            options = {"bits": BITS, "group_size": 32, **changes.get(name, {})}
            weight = random_weight(5 + 16 * index, K, seed=seed + index, **options)
            bias = torch.ones(weight.out_features) if name == "k_proj" else None
            layer = PlaneLinear.from_weight(weight, bias, name=name, state=state)
            layer.pack()
            setattr(self, name, layer)

    def forward(self, x):
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]


@pytest.fixture(autouse=True)
def not_forced(monkeypatch):
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)


@pytest.fixture
def pair(seed):
    """The same layers with and without sharing."""
    alone, together = Attention(seed), Attention(seed)
    assert fuse(together) == 1
    return alone, together


@pytest.fixture
def calls(monkeypatch):
    """How many weights each shared call had."""
    counts = []
    real = fused.linear_many

    def counting(x, weights, bits):
        counts.append(len(weights))
        return real(x, weights, bits)

    monkeypatch.setattr(fused, "linear_many", counting)
    return counts


def activations(seed, rows=3):
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(seed))


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for y, other in zip(found, expected, strict=True):
        assert torch.equal(y, other)


def group_of(model):
    return model.q_proj.fused


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return 1
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(tensors_in, children))


def nothing_waits(group):
    return tensors_in({key: value for key, value in vars(group).items() if key != "members"}) == 0


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_are_those_of_separate_calls_and_come_from_one(pair, calls, rows, dtype, seed):
    alone, together = pair
    for step, bits in enumerate((2, 4, 4, 3)):
        x = activations(seed + step, rows).to(dtype)
        with use_bits(alone, bits), use_bits(together, bits):
            assert_equal(together(x), alone(x))
        assert nothing_waits(group_of(together))
    assert calls == [3] * 4


def test_leading_dimensions(pair, calls, seed):
    alone, together = pair
    x = activations(seed, 6).view(2, 3, K)
    assert_equal(together(x), alone(x))
    assert calls == [3]


@pytest.mark.parametrize(
    "change", [lambda x: x.mul_(2), lambda x: x.zero_(), lambda x: x[0].add_(1)], ids=["mul", "zero", "view"]
)
def test_a_change_of_the_input_between_calls_is_noticed(pair, change, seed):
    alone, together = pair
    x = activations(seed)
    assert torch.equal(together.q_proj(x), alone.q_proj(x))
    with torch.no_grad():
        change(x)
    assert torch.equal(together.k_proj(x), alone.k_proj(x))
    assert torch.equal(together.v_proj(x), alone.v_proj(x))


def test_another_input_of_the_same_values_is_another_input(pair, seed):
    alone, together = pair
    x = activations(seed)
    together.q_proj(x)
    other = x + 1
    assert torch.equal(together.k_proj(other), alone.k_proj(other))
    assert torch.equal(together.v_proj(x), alone.v_proj(x))


def test_an_input_at_the_address_of_one_that_is_gone(pair, seed):
    alone, together = pair
    for step in range(20):
        x = activations(seed + step)
        together.q_proj(x)
        del x
        y = activations(seed + step + 1000)
        assert torch.equal(together.k_proj(y), alone.k_proj(y))


def test_other_bits_between_calls(pair, seed):
    alone, together = pair
    x = activations(seed)
    with use_bits(together, 2), use_bits(alone, 2):
        assert torch.equal(together.q_proj(x), alone.q_proj(x))
    with use_bits(together, 4), use_bits(alone, 4):
        assert torch.equal(together.k_proj(x), alone.k_proj(x))
    with use_bits(together, 2), use_bits(alone, 2):
        assert torch.equal(together.v_proj(x), alone.v_proj(x))


@pytest.mark.parametrize("plan", [(2, 2, 4), (2, 3, 2), (4, 2, 2), (2, 3, 4)], ids=str)
def test_a_plan_with_different_bits_in_a_group(pair, plan, seed):
    alone, together = pair
    bits = dict(zip(NAMES, plan, strict=True))
    with use_bits(alone, bits), use_bits(together, bits):
        for step in range(4):
            x = activations(seed + step)
            assert_equal(together(x), alone(x))
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert nothing_waits(group_of(together))
    assert alive() is None


def test_bits_of_each_row(pair, calls, seed):
    alone, together = pair
    x, bits = activations(seed), torch.tensor([2, 4, 3])
    with use_bits(alone, bits), use_bits(together, bits):
        assert_equal(together(x), alone(x))
    assert calls == [3], "these rows have the same bits in all layers"


def test_from_a_number_to_rows_between_calls(pair, seed):
    alone, together = pair
    x = activations(seed)
    together.q_proj(x)
    with use_bits(alone, torch.tensor([2, 4, 3])), use_bits(together, torch.tensor([2, 4, 3])):
        assert torch.equal(together.k_proj(x), alone.k_proj(x))
    assert torch.equal(together.v_proj(x), alone.v_proj(x))


def test_inference_mode(pair, seed):
    """Tensors made there have no version by which a change could be noticed."""
    alone, together = pair
    outside = activations(seed)
    with torch.inference_mode():
        inside = activations(seed + 1)
        for x in (inside, outside):
            assert_equal(together(x), alone(x))
        together.q_proj(inside)
        inside.mul_(2)
        assert torch.equal(together.k_proj(inside), alone.k_proj(inside))


@torch.inference_mode()
def test_tensors_of_inference_mode_share_calls(pair, calls, seed):
    alone, together = pair
    for step, bits in enumerate((2, 4, 3)):
        x = activations(seed + step)
        assert x.is_inference()
        with use_bits(alone, bits), use_bits(together, bits):
            assert_equal(together(x), alone(x))
        assert nothing_waits(group_of(together))
    assert calls == [3] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "change", [lambda x: x.mul_(2), lambda x: x[0].add_(1), lambda x: x.data.neg_()], ids=["mul", "view", "data"]
)
@torch.inference_mode()
def test_a_change_of_an_inference_tensor_between_calls_is_noticed(pair, change, dtype, seed):
    alone, together = pair
    for layer in NAMES[1:]:
        x = activations(seed).to(dtype)
        assert torch.equal(together.q_proj(x), alone.q_proj(x))
        change(x)
        assert torch.equal(getattr(together, layer)(x), getattr(alone, layer)(x))


@torch.inference_mode()
def test_nan_in_an_inference_tensor_is_no_change(pair, calls, seed):
    _, together = pair
    for _ in range(3):
        x = activations(seed)
        x[0, 0] = torch.nan
        together(x)
    assert calls == [3] * 3


def test_an_exception_between_calls(pair, seed):
    alone, together = pair
    x = activations(seed)
    together.q_proj(x)
    with pytest.raises(ValueError, match="expected x"):
        together.k_proj(torch.randn(2, K - 1))
    with pytest.raises(UnsupportedBitsError), use_bits(together, 5):
        pass
    y = activations(seed + 1)
    assert_equal(together(y), alone(y))
    assert torch.equal(together.v_proj(x), alone.v_proj(x))


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 0, 2), (0, 0, 1, 2), (0, 1, 0, 1, 2)], ids=str)
def test_any_order_of_calls(pair, order, seed):
    alone, together = pair
    for step in range(4):
        x = activations(seed + step)
        for index in order:
            assert torch.equal(getattr(together, NAMES[index])(x), getattr(alone, NAMES[index])(x))


def test_one_layer_called_alone_stops_sharing_and_keeps_nothing(pair, calls, seed):
    alone, together = pair
    for step in range(6):
        x = activations(seed + step)
        assert torch.equal(together.k_proj(x), alone.k_proj(x))
    assert sum(calls) <= 3 * 3, "no more than a few calls go to waste"
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert alive() is None
    assert nothing_waits(group_of(together))
    y = activations(seed)
    assert_equal(together(y), alone(y))


def test_a_single_waste_does_not_stop_sharing(pair, calls, seed):
    _, together = pair
    together.q_proj(activations(seed))
    for step in range(5):
        together(activations(seed + step))
    assert calls == [3] * 6


def test_input_and_results_are_let_go_after_a_round(pair, seed):
    _, together = pair
    x = activations(seed)
    results = together(x)
    alive = [weakref.ref(x), *map(weakref.ref, results)]
    del x, results
    gc.collect()
    assert [reference() for reference in alive] == [None] * 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_shares_among_its_own_layers(pair, calls, copied, seed):
    """Also one that is made while results wait."""
    alone, together = pair
    x = activations(seed)
    together.q_proj(x)
    twin = copied(together)
    group = group_of(twin)
    assert group is not group_of(together)
    assert group is twin.k_proj.fused is twin.v_proj.fused
    assert group.members == [twin.q_proj, twin.k_proj, twin.v_proj]
    assert nothing_waits(group)
    calls.clear()
    y = activations(seed + 1)
    assert_equal(twin(y), alone(y))
    assert calls == [3]
    assert torch.equal(together.k_proj(x), alone.k_proj(x)), "the original goes on"


def test_a_layer_that_is_not_packed_does_not_share(pair, calls, seed):
    alone, together = pair
    together.v_proj.unpack()
    alone.v_proj.unpack()
    x = activations(seed)
    assert_equal(together(x), alone(x))
    assert calls == [2]


def test_new_weights_between_calls(pair, seed):
    _, together = pair
    other, x = Attention(seed + 7), activations(seed)
    together.q_proj(x)
    together.load_state_dict(other.state_dict())
    assert torch.equal(together.k_proj(x), other.k_proj(x))


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ({"k_proj": {"group_size": 64}}, 0),
        ({"v_proj": {"bits": (2, 4)}}, 0),
        ({"q_proj": {"kind": "codebook"}}, 0),
        ({name: {"kind": "codebook"} for name in NAMES}, 1),
    ],
    ids=["other-groups", "other-bits", "one-codebook", "codebooks"],
)
def test_which_layers_share(changes, groups, seed):
    model, alone = Attention(seed, **changes), Attention(seed, **changes)
    assert fuse(model) == groups
    x = activations(seed)
    assert_equal(model(x), alone(x))


@pytest.mark.parametrize("leaf", NAMES)
def test_a_layer_replaced_after_fusing(pair, leaf, seed):
    """By an adapter, say: the others go on."""
    alone, together = pair
    for model in pair:
        setattr(model, leaf, nn.Identity())
    for step in range(4):
        x = activations(seed + step)
        assert_equal(together(x), alone(x))
    assert nothing_waits(together.v_proj.fused if leaf == "q_proj" else group_of(together))


def test_compiled(pair, seed):
    alone, together = pair
    torch._dynamo.reset()
    compiled = torch.compile(together, fullgraph=True, backend="aot_eager")
    for bits in (2, 4, 2):
        x = activations(seed + bits)
        with use_bits(alone, bits), use_bits(together, bits):
            assert_equal(compiled(x), alone(x))
            assert_equal(together(x), alone(x))
    torch._dynamo.reset()


def test_one_model_called_from_several_threads(pair, seed):
    alone, together = pair
    xs = [activations(seed + index) for index in range(4)]
    expected = [alone(x) for x in xs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work(index):
        for _ in range(500):
            assert_equal(together(xs[index]), expected[index])
            fuse(together)  # else sharing would stop at the first calls that go to waste

    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("rows", [3, 20])
def test_gradients_with_sharing_are_those_without(pair, rows, seed):
    alone, together = pair
    x = activations(seed, rows).requires_grad_()
    ys, others = together(x), alone(x)
    assert_equal(ys, others)
    gradients = [torch.randn_like(y) for y in ys]
    (found,), (expected,) = torch.autograd.grad(ys, x, gradients), torch.autograd.grad(others, x, gradients)
    assert_equal([found], [expected])
    dense = sum(g @ decode(layer.plane_weight(), 4) for g, layer in zip(gradients, together.children(), strict=True))
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-3)


def test_a_result_without_a_gradient_is_not_for_a_sibling_that_needs_one(pair, seed):
    """The first layer's call made all three, under no_grad; a frozen part of a model may be called so."""
    _, together = pair
    x = activations(seed).requires_grad_()
    with torch.no_grad():
        together.q_proj(x)
    (found,) = torch.autograd.grad(together.k_proj(x).sum(), x)
    expected = decode(together.k_proj.plane_weight(), 4).sum(0).expand(3, K)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    tangents = torch.func.jvp(lambda x: together.v_proj(x), (x.detach(),), (torch.ones(3, K),))[1]
    expected = decode(together.v_proj.plane_weight(), 4).sum(1).expand(3, -1)
    torch.testing.assert_close(tangents, expected, rtol=1e-4, atol=1e-4)
