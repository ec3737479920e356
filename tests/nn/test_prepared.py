"""A layer prepared for a kernel is the same layer: what it stores, loads, copies and computes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import assert_same_weight, plane_model, random_weight
from kernel_errors import promise_of

from bitstrata.kernels import registry
from bitstrata.kernels.cpu import BlockedWeight, missing
from bitstrata.nn import PlaneLinear, use_bits
from bitstrata.planes import decode

pytestmark = pytest.mark.skipif(bool(missing), reason="the native kernels are not built")
N, K = 33, 70
BITS = (2, 3, 4)
both_kinds_of_scales = pytest.mark.parametrize("scales", ["affine", "affine8", "codebook"])


@pytest.fixture(autouse=True)
def not_forced(monkeypatch):
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)


def stored(scales="affine", seed=0):
    return random_weight(N, K, BITS, 32, scales, seed)


def layer_of(scales="affine", seed=0, dtype=torch.float32, bias=True):
    given = torch.arange(N).to(dtype) if bias else None
    return PlaneLinear.from_weight(stored(scales, seed), given, dtype=dtype)


def prepared_layer(*arguments, **options):
    layer = layer_of(*arguments, **options)
    layer.pack()
    assert layer.packed.layout != "stored"
    return layer


def activations(seed, dtype=torch.float32, rows=5):
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_right(layer, seed, dtype=torch.float32):
    """At each bits, and row by row, within what the kernel that runs promises."""
    x = activations(seed, dtype)
    kernel = layer.packed.kernel_for(len(x), dtype)
    weight, bias = stored(layer.kind, seed), layer.bias
    layer.bias = None
    row_bits = torch.tensor([2, 4, 3, 3, 2])
    try:
        with use_bits(layer, row_bits):
            mixed = layer(x)
        for bits in BITS:
            check, rows = promise_of(kernel, weight, bits), row_bits == bits
            with use_bits(layer, bits):
                check(layer(x), x, "uniform")
            check(mixed[rows], x[rows], "mixed")
    finally:
        layer.bias = bias


@both_kinds_of_scales
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_prepared_layer_computes_the_same_thing(scales, dtype, seed):
    assert_right(prepared_layer(scales, seed, dtype), seed, dtype)


@both_kinds_of_scales
def test_the_state_dict_is_that_of_the_stored_layer(scales, seed):
    layer = layer_of(scales, seed)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.pack()
    after = layer.state_dict()
    assert sorted(after) == sorted(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name
    layer.unpack()
    assert sorted(layer.state_dict()) == sorted(before)
    assert_same_weight(layer.plane_weight(), stored(scales, seed))


def test_the_state_dict_has_the_prefix_of_the_layer(seed):
    model = torch.nn.ModuleDict({"inner": prepared_layer(seed=seed)})
    assert {name.split(".")[0] for name in model.state_dict()} == {"inner"}
    assert torch.equal(model.state_dict()["inner.plane_1"], stored(seed=seed).planes[1])


@both_kinds_of_scales
@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_loads_into_a_prepared_layer(scales, strict, seed):
    source, target = prepared_layer(scales, seed), prepared_layer(scales, seed + 1)
    source.bias += 1
    target.load_state_dict(source.state_dict(), strict=strict)
    assert_same_weight(target.plane_weight(), stored(scales, seed))
    assert torch.equal(target.bias, source.bias)
    assert_right(target, seed)


def test_a_state_dict_is_a_copy_that_later_loading_does_not_change(seed):
    layer = prepared_layer(seed=seed)
    state = layer.state_dict()
    layer.load_state_dict(prepared_layer(seed=seed + 1).state_dict())
    assert torch.equal(state["plane_0"], stored(seed=seed).planes[0])


def test_nothing_is_held_twice(seed):
    """Prepared, the layer has the kernel's tensors and the placeholder; restored, the stored ones."""
    layer = PlaneLinear.from_weight(random_weight(64, 512, BITS, 128, seed=seed))
    size = sum(tensor.nbytes for tensor in layer.buffers())
    layer.pack()
    assert {name.rpartition("_")[0] or name for name, _ in layer.named_buffers()} == {"packed", "weight"}
    assert sum(tensor.nbytes for tensor in layer.buffers()) == size, "nothing is padded at this shape"
    held = {tensor.data_ptr() for tensor in layer.buffers() if tensor.numel()}
    assert held == {t.data_ptr() for t in [*layer.packed.planes, *layer.packed.scales.values()]}
    assert not any(hasattr(layer, name) for name in ("plane_0", "scale_2", "offset_4"))
    layer.unpack()
    assert not any(name.startswith("packed") for name, _ in layer.named_buffers())
    assert sum(tensor.nbytes for tensor in layer.buffers()) == size


def test_preparing_and_restoring_twice_is_as_once(seed):
    layer = prepared_layer(seed=seed)
    packed = layer.packed
    layer.pack()
    assert layer.packed is packed
    layer.unpack()
    layer.unpack()
    assert layer.packed.layout == "stored"
    assert_same_weight(layer.plane_weight(), stored(seed=seed))


@both_kinds_of_scales
def test_bytes_read_are_those_of_the_stored_tensors(scales, seed):
    layer = layer_of(scales, seed)
    for _ in range(2):  # not prepared, then prepared
        for bits in BITS:
            assert layer.bytes_read(bits) == stored(scales, seed).bytes_read(bits)
        layer.pack()


def through_torch(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": through_torch,
}


@both_kinds_of_scales
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_copies_compute_the_same_and_share_nothing(scales, copied, seed):
    layer = prepared_layer(scales, seed)
    twin, x = copied(layer), activations(seed)
    for bits in BITS:
        with use_bits(layer, bits), use_bits(twin, bits):
            assert torch.equal(twin(x), layer(x))
    assert twin.bits_state is not layer.bits_state
    pointers = {tensor.data_ptr() for tensor in layer.buffers() if tensor.numel()}
    assert not pointers & {tensor.data_ptr() for tensor in twin.buffers()}
    for tensor in [*layer.buffers(), layer.bias]:
        tensor.zero_()
    assert_same_weight(twin.plane_weight(), stored(scales, seed))
    assert_right(twin, seed)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_a_copy_holds_nothing_twice_either(copied, seed):
    twin = copied(prepared_layer(seed=seed))
    buffers = {tensor.data_ptr() for tensor in twin.buffers() if tensor.numel()}
    assert twin.packed.layout == "stored" or buffers == {
        tensor.data_ptr() for tensor in [*twin.packed.planes, *twin.packed.scales.values()]
    }


def test_a_pickle_is_about_as_large_as_the_layer(seed):
    layer = PlaneLinear.from_weight(random_weight(64, 512, BITS, 128, seed=seed))
    plain = len(pickle.dumps(layer))
    layer.pack()
    assert len(pickle.dumps(layer)) < 1.2 * plain


CHANGES = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "to-bfloat16": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "float": (lambda m: m.float(), torch.float32),
    "double": (lambda m: m.double(), torch.float64),
    "there-and-back": (lambda m: m.double().half().float(), torch.float32),
    "to-cpu": (lambda m: m.to("cpu"), torch.float32),
}


@both_kinds_of_scales
@pytest.mark.parametrize("change", CHANGES)
def test_changing_dtype_leaves_the_weight_alone(scales, change, seed):
    layer = prepared_layer(scales, seed)
    apply, dtype = CHANGES[change]
    apply(layer)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert_same_weight(layer.plane_weight(), stored(scales, seed))
    assert_right(layer, seed, dtype)


def test_a_layer_stays_prepared_where_the_kernels_run(seed):
    layer = prepared_layer(seed=seed)
    assert layer.half().packed.layout != "stored"
    assert layer.double().packed.layout == "stored"


def test_a_prepared_layer_can_go_to_the_meta_device(seed):
    layer = prepared_layer(seed=seed).to("meta")
    assert layer.packed.layout == "stored"
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert layer(torch.empty(2, K, device="meta")).shape == (2, N)
    layer.pack()
    assert layer.packed.layout == "stored", "there is nothing to prepare"


@both_kinds_of_scales
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_reference_can_be_forced(scales, dtype, seed, monkeypatch):
    """Where the weight is packed; what the environment says later changes nothing."""
    layer, x = layer_of(scales, seed, dtype, bias=False), activations(seed, dtype)
    layer.pack("reference")
    monkeypatch.setenv(registry.ENVIRONMENT, "scalar")
    for bits in BITS:
        with use_bits(layer, bits):
            assert torch.equal(layer(x), torch.nn.functional.linear(x, decode(stored(scales, seed), bits, dtype)))
    with use_bits(layer, torch.tensor([2, 3, 4, 4, 2])):
        assert torch.equal(
            layer(x)[:1], torch.nn.functional.linear(x[[0, 4]], decode(stored(scales, seed), 2, dtype))[:1]
        )


def test_a_forced_reference_prepares_nothing(seed, monkeypatch):
    monkeypatch.setenv(registry.ENVIRONMENT, "reference")
    layer = layer_of(seed=seed)
    layer.pack()
    assert layer.packed.layout == "stored"
    assert_right(layer, seed)


def test_a_layer_of_float64_stays_as_it_is(seed):
    layer = layer_of(seed=seed, dtype=torch.float64)
    layer.pack()
    assert layer.packed.layout == "stored"
    assert_right(layer, seed, torch.float64)


def test_bias_is_added_once(seed):
    with_bias, without = prepared_layer(seed=seed), prepared_layer(seed=seed, bias=False)
    x = activations(seed)
    assert torch.equal(with_bias(x), without(x) + with_bias.bias)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_without_a_graph_break_at_several_bits(backend, seed):
    torch._dynamo.reset()
    model = plane_model(seed, bias=True)
    for layer in model:
        layer.pack()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(4, 70)
    for bits in (2, 4, torch.tensor([2, 4, 3, 3]), 2, {"0": 2, "1": 4}):
        with use_bits(model, bits):
            assert torch.equal(compiled(x), model(x))
    torch._dynamo.reset()


def test_inference_mode_and_autocast(seed):
    layer, x = prepared_layer(seed=seed), activations(seed)
    expected = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x.clone()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)


@pytest.fixture
def packs(monkeypatch):
    """The weights that were packed since."""
    packed = []
    real = BlockedWeight.pack.__func__

    def counting(cls, weight, kernel, **options):
        packed.append(weight)
        return real(cls, weight, kernel, **options)

    monkeypatch.setattr(BlockedWeight, "pack", classmethod(counting))
    return packed


def from_meta(layer, state):
    """Loaded into a layer that has no tensors yet."""
    layer.to("meta").load_state_dict(state, assign=True)
    return layer


LOADS = {
    "load": lambda layer, state: layer.load_state_dict(state),
    "assign": lambda layer, state: layer.load_state_dict(state, assign=True),
    "with more": lambda layer, state: layer.load_state_dict({"other": state["plane_0"], **state}, strict=False),
    "twice": lambda layer, state: [layer.load_state_dict(state) for _ in range(2)],
    "from meta": from_meta,
    "there and back": lambda layer, state: [layer.double(), layer.load_state_dict(state), layer.float()],
}


@both_kinds_of_scales
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
def test_loading_leaves_a_layer_prepared_and_no_call_packs(scales, load, packs, seed):
    source, target = prepared_layer(scales, seed), prepared_layer(scales, seed + 1)
    load(target, source.state_dict())
    assert target.packed.layout != "stored"
    assert target.fused is None
    packs.clear()
    assert_right(target, seed)
    assert packs == [], "a call packed the weight"
    assert_same_weight(target.plane_weight(), stored(scales, seed))


@pytest.mark.parametrize("copied", [*COPIES.values(), lambda m: m.to("cpu"), lambda m: m.half().float()])
def test_no_call_on_a_copy_packs(copied, packs, seed):
    twin = copied(prepared_layer(seed=seed))
    packs.clear()
    assert_right(twin, seed)
    assert packs == []


def test_a_layer_that_nobody_prepared_stays_as_it_is(seed):
    layer = layer_of(seed=seed)
    layer.load_state_dict(layer_of(seed=seed + 1).state_dict())
    assert layer.packed.layout == "stored"
    layer.pack()
    layer.unpack()
    layer.load_state_dict(layer_of(seed=seed + 1).state_dict())
    assert layer.packed.layout == "stored"
    assert copy.deepcopy(layer).packed.layout == "stored"
