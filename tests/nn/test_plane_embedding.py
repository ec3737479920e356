"""PlaneEmbedding and TiedHead: rows and products of one weight, in the stored order and in a kernel's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import assert_linear_close, assert_same_weight, random_weight

from bitstrata.nn import BitsState, PlaneEmbedding, PlaneLinear, TiedHead, multiplied_layers
from bitstrata.planes import decode

SHAPES = [(1, 5), (7, 33), (15, 70), (16, 64), (17, 128), (65, 31), (300, 96)]


def embedding(N, K, *, bits=6, scales="affine", tied=True, dtype=torch.float32, seed=0):
    weight = random_weight(N, K, (bits,), 32, scales, seed)
    made = PlaneEmbedding.from_weight(weight, dtype=dtype)
    head = TiedHead(made) if tied else None
    made.pack()
    return weight, made, head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", ["affine", "affine8", "codebook"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_rows_are_exactly_those_of_the_decoded_weight(N, K, tied, scales, dtype, seed):
    for bits in (1, 3, 6, 8):
        weight, module, _ = embedding(N, K, bits=bits, scales=scales, tied=tied, dtype=dtype, seed=seed)
        table = decode(weight, bits, dtype)
        generator = torch.Generator().manual_seed(seed)
        for shape in ((), (1,), (3,), (2, 9), (40,), (0,)):
            ids = torch.randint(0, N, shape, generator=generator)
            assert torch.equal(module(ids), torch.nn.functional.embedding(ids, table)), (bits, shape)
        assert torch.equal(module(torch.tensor([N - 1, 0], dtype=torch.int32)), table[[N - 1, 0]])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("wrong", [-1, 17, 10**6])
def test_a_token_outside_the_vocabulary_is_an_index_error(tied, wrong):
    module = embedding(17, 64, tied=tied)[1]
    with pytest.raises(IndexError, match=f"token {wrong} is out of range: the embedding has 17 rows"):
        module(torch.tensor([3, wrong]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_multiply_rows_as_the_architectures_do(dtype):
    weight = random_weight(20, 48, (4,))
    table = decode(weight, 4, dtype)
    ids = torch.arange(20)
    for rounded, scale in ((True, torch.tensor(6.93).to(dtype)), (False, 6.93)):
        module = PlaneEmbedding(20, 48, bits=4, group_size=32, scale=6.93, round_scale=rounded, dtype=dtype)
        module.load_state_dict({**weight.tensors(), "weight": torch.empty(0)})
        assert torch.equal(module(ids), table * scale)


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("bias", [True, False])
def test_a_tied_head_multiplies_by_the_embedding(rows, bias, monkeypatch, seed):
    monkeypatch.setenv("BITSTRATA_KERNEL", "reference")
    weight, module, _ = embedding(65, 70, seed=seed)
    head = TiedHead(module, bias=bias)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 70, generator=generator)
    if bias:
        head.bias.data.normal_(generator=generator)
    y = head(x) - (head.bias if bias else 0)
    assert_linear_close(y, x, decode(weight, 6, torch.float64), "tied head")


def test_only_the_embedding_stores_moves_and_counts_the_planes():
    weight, module, head = embedding(33, 64)
    model = torch.nn.ModuleDict({"embed": module, "head": head})
    assert {name.split(".")[0] for name in model.state_dict()} == {"embed"}
    assert model.state_dict().keys() == {"embed.weight", *(f"embed.{name}" for name in weight.tensors())}
    assert multiplied_layers(model) == [head]
    assert head.bytes_read(2) == weight.bytes_read(6)
    x = torch.randn(3, 64)
    expected = head(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin["head"].embedding is twin["embed"]
        assert_same_weight(twin["embed"].plane_weight(), weight)
        assert torch.equal(twin["head"](x), expected)
    model.to(torch.bfloat16)
    assert head.weight.dtype == module(torch.tensor([1])).dtype == torch.bfloat16
    assert_same_weight(module.plane_weight(), weight)


def test_an_embedding_alone_multiplies_nothing():
    assert multiplied_layers(embedding(33, 64, tied=False)[1]) == []


def test_a_fixed_layer_runs_and_counts_at_its_own_bits(monkeypatch):
    monkeypatch.setenv("BITSTRATA_KERNEL", "reference")
    weight = random_weight(33, 64, (6,))
    layer = PlaneLinear.from_weight(weight, name="lm_head", state=BitsState({"other": (2, 3)}, fixed={"lm_head": 6}))
    assert layer.bytes_read(2) == layer.bytes_read(6) == weight.bytes_read(6)
    x = torch.randn(2, 64)
    torch.testing.assert_close(layer(x), x @ decode(weight, 6).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_the_lookup_is_one_node_for_a_compiler(tied):
    weight, module, _ = embedding(40, 64, tied=tied)
    ids = torch.tensor([[1, 39], [0, 7]])
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids), decode(weight, 6)[ids])
    torch.library.opcheck(torch.ops.bitstrata.lookup.default, (ids, *module.packed.arguments(6), 6, torch.bfloat16))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_gradients_through_a_tied_head(rows, bias, seed):
    weight, _, _ = embedding(65, 70, seed=seed)
    made = PlaneEmbedding.from_weight(weight)
    head = TiedHead(made, bias)
    made.pack()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, rows, 70, generator=generator).requires_grad_()
    g = torch.randn(2, rows, 65, generator=generator)
    head(x).backward(g)
    assert_linear_close(x.grad, g, decode(weight, 6, torch.float64).T, f"rows={rows}")
    assert not made(torch.tensor([1, 2])).requires_grad, "rows are constants"
