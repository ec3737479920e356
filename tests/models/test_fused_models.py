"""A loaded model shares calls among q, k, v and among gate, up; its outputs are those without sharing."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import bitstrata
from bitstrata.kernels import registry
from bitstrata.kernels.cpu import missing
from bitstrata.nn import PlaneLinear, bits_state, fused

pytestmark = pytest.mark.skipif(bool(missing), reason="the native kernels are not built")
BLOCKS = 2


@pytest.fixture(autouse=True)
def not_forced(monkeypatch):
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)


@pytest.fixture
def pair(quantized):
    """The same tiny Llama with sharing, as it is loaded, and without."""
    out = quantized("llama")[2]
    alone = bitstrata.load(out)
    for layer in layers_of(alone):
        layer.fused = None
    return alone, bitstrata.load(out)


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


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, PlaneLinear)]


def tokens(count, seed=0):
    return torch.randint(3, 96, (1, count), generator=torch.Generator().manual_seed(seed))


def test_the_groups_of_a_llama(pair, quantized):
    groups = {id(layer.fused): layer.fused for layer in layers_of(pair[1]) if layer.fused is not None}
    names = sorted([member.name.rpartition(".")[2] for member in group.members] for group in groups.values())
    assert names == [["gate_proj", "up_proj"]] * BLOCKS + [["q_proj", "k_proj", "v_proj"]] * BLOCKS
    assert not any(layer.fused for layer in layers_of(bitstrata.load(quantized("gpt2")[2])))


@pytest.mark.parametrize("count", [1, 5, 24], ids=lambda n: f"{n}-tokens")
def test_outputs_are_the_same(pair, calls, count):
    alone, together = pair
    with torch.no_grad():
        for bits in (2, 8, 3, 3):
            assert torch.equal(together(tokens(count), bits=bits).logits, alone(tokens(count), bits=bits).logits)
    assert sorted(calls) == [2] * 4 * BLOCKS + [3] * 4 * BLOCKS


def test_bits_that_differ_within_a_group_and_within_a_batch(pair):
    alone, together = pair
    plan = {name: (2, 3, 8)[index % 3] for index, name in enumerate(bits_state(together).layers)}
    ids = tokens(10).view(2, 5)
    with torch.no_grad():
        for bits in (plan, torch.tensor([2, 8]), 3, torch.tensor([3, 3]), plan):
            assert torch.equal(together(ids, bits=bits).logits, alone(ids, bits=bits).logits)


def test_generation(pair, calls):
    alone, together = pair
    for bits in (2, 8):
        settings = {"bits": bits, "max_new_tokens": 8, "do_sample": False}
        assert torch.equal(together.generate(tokens(5), **settings), alone.generate(tokens(5), **settings))
    assert calls, "calls were shared"


def test_inference_mode(pair):
    alone, together = pair
    with torch.inference_mode():
        for bits in (2, 8):
            assert torch.equal(together(tokens(5), bits=bits).logits, alone(tokens(5), bits=bits).logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_share_among_their_own_layers(pair, calls, copied):
    alone, together = pair
    twin = copied(together)
    own = {id(layer) for layer in layers_of(twin)}
    groups = {id(layer.fused): layer.fused for layer in layers_of(twin) if layer.fused is not None}
    assert len(groups) == 2 * BLOCKS
    assert all(id(member) in own for group in groups.values() for member in group.members)
    with torch.no_grad():
        assert torch.equal(twin(tokens(5), bits=3).logits, alone(tokens(5), bits=3).logits)
    assert sorted(calls) == [2] * BLOCKS + [3] * BLOCKS


def test_an_exception_in_the_middle_of_a_block(pair):
    alone, together = pair

    def fail(*_):
        raise RuntimeError("stop")

    hook = together.model.layers[1].self_attn.k_proj.register_forward_pre_hook(fail)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="stop"):
            together(tokens(5), bits=2)
        hook.remove()
        for bits in (2, 8):
            assert torch.equal(together(tokens(5), bits=bits).logits, alone(tokens(5), bits=bits).logits)


def test_compiled(pair):
    alone, together = pair
    torch._dynamo.reset()
    compiled = torch.compile(together, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for bits in (2, 8, 2):
            expected = alone(tokens(5), bits=bits, use_cache=False).logits
            # the compiler may round the rest of the model differently
            torch.testing.assert_close(
                compiled(tokens(5), bits=bits, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4
            )
    torch._dynamo.reset()


@torch.inference_mode()
def test_inference_mode_shares_the_same_calls(pair, calls):
    alone, together = pair
    for bits in (2, 8):
        assert torch.equal(together(tokens(5), bits=bits).logits, alone(tokens(5), bits=bits).logits)
    assert sorted(calls) == [2] * 2 * BLOCKS + [3] * 2 * BLOCKS
