"""Models that accelerate has placed, and others whose `forward` somebody has wrapped: bits reach them all."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM

import bitstrata
from bitstrata.errors import UnsupportedBitsError, UsageError
from bitstrata.nn import PlaneLinear, bits_state
from bitstrata.plans import Plan

PLACES = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}


def placed(out, room, **options):
    places = {**PLACES, "model.layers.0": "cpu", "model.layers.1": "disk"}
    return AutoModelForCausalLM.from_pretrained(out, device_map=places, offload_folder=room, **options)


def hooked(out, hook):
    model = bitstrata.load(out)
    add_hook_to_module(model, hook)
    return model


def offloaded(offload, *arguments, **options):
    def make(out, room):
        model = bitstrata.load(out)
        offload(model, *(room if item == "room" else item for item in arguments), **options)
        return model

    return make


def wrapped(out, wrap):
    model = bitstrata.load(out)
    model.forward = wrap(model)
    return model


def swallowing(model):
    """As some libraries patch models: a forward of their own, which takes any keyword and knows nothing of bits."""

    def forward(self, *arguments, **options):
        options.pop("bits", None)
        return LlamaForCausalLM.forward(self, *arguments, **options)

    return types.MethodType(forward, model)


def removed(out, room):
    model = placed(out, room)
    remove_hook_from_module(model)
    return model


def removed_everywhere(out, room):
    model = bitstrata.load(out)
    cpu_offload(model)
    remove_hook_from_module(model, recurse=True)
    return model


MODELS = {
    "disk": placed,
    "disk with buffers": functools.partial(placed, offload_buffers=True),
    "all on disk": lambda out, room: AutoModelForCausalLM.from_pretrained(
        out, device_map={"": "disk"}, offload_folder=room
    ),
    "hook afterwards": lambda out, room: hooked(out, ModelHook()),
    "cpu_offload": offloaded(cpu_offload),
    "cpu_offload with buffers": offloaded(cpu_offload, offload_buffers=True),
    "disk_offload": offloaded(disk_offload, "room"),
    "hooks removed": removed,
    "hooks removed everywhere": removed_everywhere,
    "copy": lambda out, room: copy.deepcopy(placed(out, room)),
    "partial": lambda out, room: wrapped(out, lambda model: functools.partial(model.forward, use_cache=False)),
    "patched": lambda out, room: wrapped(out, swallowing),
}


@pytest.fixture
def out(quantized):
    return quantized("llama")[2]


@pytest.fixture
def ids(seed):
    return torch.randint(3, 96, (2, 21), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=MODELS)
def model(request, out, tmp_path):
    with torch.no_grad():
        yield MODELS[request.param](out, tmp_path)


def test_bits_of_a_call(model, out, ids):
    whole = bitstrata.load(out)
    layers = list(bits_state(whole).layers)
    plan = Plan({name: (2, 3, 8)[index % 3] for index, name in enumerate(layers)})
    rows = torch.tensor([2, 8])
    for bits in (2, 3, 8, plan, rows, [3, plan]):
        assert torch.equal(model(ids, bits=bits).logits, whole(ids, bits=bits).logits)
    assert torch.equal(model(ids).logits, whole(ids, bits=8).logits)
    assert not torch.equal(whole(ids, bits=2).logits, whole(ids, bits=8).logits)
    assert bits_state(model).value == 8


def test_bits_that_cannot_be_run_are_refused(model, ids):
    with pytest.raises(UnsupportedBitsError) as caught:
        model(ids, bits=7)
    assert caught.value.hint == "supported bits: 2, 3, 8"
    for wrong in ("nonsense", 2.0, True, [2, "3"]):
        with pytest.raises(UsageError, match="bits must be an int"):
            model(ids, bits=wrong)
    with pytest.raises(UnsupportedBitsError):
        model(ids, bits=torch.tensor([2, 7]))
    assert bits_state(model).value == 8


def test_generate_and_use_bits(model, out, ids):
    whole = bitstrata.load(out)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, bits=2, **settings), whole.generate(ids, bits=2, **settings))
    with bitstrata.use_bits(model, 3):
        assert torch.equal(model(ids).logits, whole(ids, bits=3).logits)


def test_forward_itself_takes_bits_where_hooks_came_while_loading(out, ids, tmp_path):
    whole = bitstrata.load(out)
    with torch.no_grad():
        for bits in (2, 8):
            assert torch.equal(placed(out, tmp_path).forward(ids, bits=bits).logits, whole(ids, bits=bits).logits)


def test_layers_of_a_placed_model_are_prepared_and_hooks_know_their_tensors(out, ids, tmp_path):
    model = placed(out, tmp_path)
    layers = [module for module in model.modules() if isinstance(module, PlaneLinear)]
    unprepared = bitstrata.load(out)
    unhooked = [module for module in unprepared.modules() if isinstance(module, PlaneLinear)]
    expected = [module.packed.layout != "stored" for module in unhooked]
    assert [layer.packed.layout != "stored" for layer in layers] == expected
    remove_hook_from_module(model, recurse=True)
    for layer in layers:
        assert not hasattr(layer, "_hf_hook")


class Adapter(nn.Module):
    """As adapters wrap a model: keywords go through."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def forward(self, *arguments, **options):
        return self.base_model(*arguments, **options)


def test_models_inside_of_others(out, ids):
    """The scales inside a model, and a module around one."""
    whole, model = bitstrata.load(out), bitstrata.load(out)
    with torch.no_grad():
        for bits in (2, 8, torch.tensor([2, 8])):
            hidden = whole(ids, bits=bits, output_hidden_states=True).hidden_states[-1]
            assert torch.equal(model.model(ids, bits=bits).last_hidden_state, hidden)
            assert torch.equal(Adapter(model)(ids, bits=bits).logits, whole(ids, bits=bits).logits)
        with bitstrata.use_bits(Adapter(model), 3):
            assert torch.equal(model(ids).logits, whole(ids, bits=3).logits)
    with pytest.raises(UnsupportedBitsError):
        model.model(ids, bits=7)


def test_compiled_with_hooks(out, ids, tmp_path):
    torch._dynamo.reset()
    whole, model = bitstrata.load(out), placed(out, tmp_path)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for bits in (2, 8):
            expected = whole(ids, bits=bits, use_cache=False).logits
            torch.testing.assert_close(compiled(ids, bits=bits, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
