"""PlaneLinear as a module: names, dtypes, copies, bias."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import assert_linear_close, assert_same_weight, plane_model, random_weight

from bitstrata.kernels import registry
from bitstrata.nn import BitsState, PlaneLinear, use_bits
from bitstrata.planes import decode

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer_of(scales="affine", bias=None, **kwargs):
    return PlaneLinear.from_weight(random_weight(5, 70, (2, 4), 32, scales, **kwargs), bias)


def test_names_of_the_state_dict_are_those_of_the_checkpoint():
    planes = [f"plane_{i}" for i in range(4)]
    affine = layer_of(bias=torch.ones(5)).state_dict()
    assert sorted(affine) == sorted([*planes, "scale_2", "offset_2", "scale_4", "offset_4", "weight", "bias"])
    assert sorted(layer_of("codebook").state_dict()) == sorted([*planes, "table_2", "table_4", "weight"])


def test_an_empty_layer_has_the_shapes_of_the_checkpoint():
    state = BitsState({"a": (2, 3)})
    layer = PlaneLinear(70, 5, name="a", state=state, bits=(2, 3), group_size=32, bias=True, dtype=torch.bfloat16)
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in layer.state_dict().items()}
    assert shapes == {
        **{f"plane_{i}": (torch.int32, (5, 3)) for i in range(3)},
        "scale_2": (torch.float16, (2, 5, 3)),
        "offset_2": (torch.float16, (5, 3)),
        "scale_3": (torch.float16, (3, 5, 3)),
        "offset_3": (torch.float16, (5, 3)),
        "weight": (torch.bfloat16, (0,)),
        "bias": (torch.bfloat16, (5,)),
    }
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("scales", ["affine", "affine8", "codebook"])
def test_from_weight_holds_exactly_that_weight(scales, seed):
    weight = random_weight(5, 70, (2, 4), 43, scales, seed)
    layer = PlaneLinear.from_weight(weight)
    assert_same_weight(layer.plane_weight(), weight)


@pytest.mark.parametrize("scales", ["affine", "affine8", "codebook"])
def test_a_state_dict_loads_into_an_empty_layer(scales, seed):
    source = layer_of(scales, torch.arange(5.0), seed=seed)
    state = BitsState({"": (2, 4)})
    target = PlaneLinear(70, 5, name="", state=state, bits=(2, 4), group_size=32, kind=scales, bias=True)
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 70)
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("change", ["half", "bfloat16", "double", "float"])
def test_changing_dtype_never_rounds_what_is_stored(change, seed, monkeypatch):
    monkeypatch.setenv(registry.ENVIRONMENT, "reference")  # exact activations
    model = plane_model(seed, bias=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    getattr(model, change)()
    dtype = model[0].weight.dtype
    assert dtype == {"half": torch.float16, "float": torch.float32}.get(change, getattr(torch, change))
    for name, tensor in model.state_dict().items():
        if name.endswith((".weight", ".bias")):
            assert tensor.dtype == dtype, name
        else:
            assert tensor.dtype == before[name].dtype, name
            assert torch.equal(tensor, before[name]), name
    x = torch.randn(9, 70).to(dtype)
    assert model(x).dtype == dtype
    model[0].bias = None
    assert_linear_close(model[0](x), x, decode(model[0].plane_weight(), 4, torch.float64), change)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_to_dtype_and_back_is_the_same_layer(dtype, seed):
    layer = layer_of(seed=seed)
    layer.to(dtype).to("cpu", torch.float32)
    assert_same_weight(layer.plane_weight(), random_weight(5, 70, (2, 4), seed=seed))


def test_to_meta_moves_and_keeps_dtypes():
    layer = layer_of().to("meta", torch.bfloat16)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert layer.scale_2.dtype == torch.float16
    assert layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_is_added_after_the_product(dtype, seed):
    bias = torch.arange(5).to(dtype)
    weight = random_weight(5, 70, seed=seed)
    x = torch.randn(3, 70).to(dtype)
    with_bias, without = PlaneLinear.from_weight(weight, bias), PlaneLinear.from_weight(weight)
    assert with_bias.bias.dtype == dtype
    assert torch.equal(with_bias(x), without(x) + bias)
    assert without.bias is None


def test_bias_is_added_to_rows_of_different_bits(seed):
    model, plain = plane_model(seed, bias=True), plane_model(seed)
    x, row_bits = torch.randn(3, 70), torch.tensor([2, 4, 3])
    with use_bits(model, row_bits), use_bits(plain, row_bits):
        assert torch.equal(model[0](x), plain[0](x) + model[0].bias)


def test_bias_is_a_copy_of_the_one_given():
    bias = torch.zeros(5)
    layer = layer_of(bias=bias)
    bias += 1
    assert layer.bias.tolist() == [0] * 5


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_compute_the_same_and_share_nothing(copy_of, seed):
    model = plane_model(seed, bias=True)
    copied = copy_of(model)
    x = torch.randn(3, 70)
    for bits in (2, 3, 4):
        with use_bits(model, bits), use_bits(copied, bits):
            assert torch.equal(copied(x), model(x))
    assert copied[0].bits_state is copied[1].bits_state is not model[0].bits_state
    for name, buffer in model.named_buffers():
        assert buffer.numel() == 0 or copied.get_buffer(name).data_ptr() != buffer.data_ptr(), name


def test_activations_of_the_wrong_width_are_refused():
    with pytest.raises(ValueError, match=r"expected x \[\.\.\., 70\]"):
        layer_of()(torch.randn(2, 69))


def test_one_dimensional_activations_work_as_in_a_linear_layer(seed):
    weight = random_weight(5, 70, seed=seed)
    x = torch.randn(70, dtype=torch.float64)
    torch.testing.assert_close(PlaneLinear.from_weight(weight)(x), decode(weight, 4, torch.float64) @ x)


def test_repr_tells_the_shape_and_the_bits():
    assert repr(layer_of("codebook")) == "PlaneLinear(70, 5, bits=2,4, group_size=32, codebook)"
