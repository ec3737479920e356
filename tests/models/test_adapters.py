"""LoRA adapters beside planes: trained, stored, loaded, and run by everything that runs a model."""

from __future__ import annotations

import random
from pathlib import Path

import peft
import pytest
import torch
from arithmetic import exact_arithmetic
from safetensors.torch import load_file, save_file
from torch import Tensor

import bitstrata
from bitstrata.demonstration.run import MODEL
from bitstrata.errors import InputError, UsageError
from bitstrata.models import load_tokenizer
from bitstrata.nn import PlaneLinear
from bitstrata.plans import Plan
from bitstrata.runtime import Engine, Request

WAIT = 120


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("adapters") / "out"
    bitstrata.quantize(MODEL, output, bits="2-4", method="rtn")
    return output


@pytest.fixture
def model(checkpoint):
    with exact_arithmetic():
        return bitstrata.load(checkpoint, bits=2, dtype=torch.float32)


@pytest.fixture(scope="module")
def windows(checkpoint) -> Tensor:
    """Real Python text, in windows of 64 tokens."""
    ids = load_tokenizer(checkpoint)(Path(random.__file__).read_text()).input_ids
    return torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)


@pytest.fixture(scope="module")
def adapter(checkpoint, windows, tmp_path_factory) -> Path:
    """An adapter trained for a moment on the model at 2 bits."""
    own = bitstrata.load(checkpoint, bits=2, dtype=torch.float32)
    train(own, windows, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), 8)
    folder = tmp_path_factory.mktemp("stored") / "adapter"
    own.save_pretrained(folder)
    return folder


def train(model, windows, config, steps):
    torch.manual_seed(0)
    model.add_adapter(config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert parameters
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    model.train()
    for step in range(steps):
        batch = windows[8 * step % len(windows) :][:8]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def loss_of(model, windows, **settings):
    with torch.no_grad():
        return float(model(windows, labels=windows, **settings).loss)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_lowers_the_loss_at_two_bits(model, windows, checkpointing):
    learned, held = windows[:-8], windows[-8:]
    before = {bits: loss_of(model, held, bits=bits) for bits in (2, 4)}
    planes = {name: decoded(layer, 2) for name, layer in layers(model).items()}
    if checkpointing:
        model.gradient_checkpointing_enable()
    train(model, learned, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), 16)
    assert loss_of(model, held) < before[2] - 0.03
    model.disable_adapters()
    assert loss_of(model, held) == before[2]
    assert loss_of(model, held, bits=4) == before[4]
    for name, layer in layers(model).items():
        assert torch.equal(decoded(layer, 2), planes[name])


def layers(model):
    return {module.name: module for module in model.modules() if isinstance(module, PlaneLinear)}


def decoded(layer, bits):
    return layer.packed.decode(bits, 0, layer.out_features, torch.float32)


def test_what_is_beside_a_layer_is_the_product(model):
    """y = W x + s B A x, at whatever bits, in float64."""
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features)
    model.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=["up_proj"], init_lora_weights=False))
    adapted = model.model.layers[0].mlp.up_proj
    a, b = adapted.lora_A["default"].weight.double(), adapted.lora_B["default"].weight.double()
    for bits in (2, 4):
        with bitstrata.use_bits(model, bits), torch.no_grad():
            found = adapted(x)
        weight = decoded(layer, bits).double() + 2 * b @ a
        assert torch.allclose(found.double(), x.double() @ weight.T, atol=1e-5)
    assert not isinstance(model.model.layers[0].mlp.gate_proj, peft.tuners.lora.Linear)


def test_everything_that_runs_a_model_runs_the_adapter(checkpoint, adapter, model, windows, monkeypatch):
    with exact_arithmetic():
        own = bitstrata.load(checkpoint, bits=2, dtype=torch.float32, adapter=adapter)
    assert loss_of(own, windows[:4]) != loss_of(model, windows[:4])
    ids = windows[0][:20].tolist()
    expected = {bits: greedy(own, ids, bits) for bits in (2, 4)}
    tokenizer = load_tokenizer(checkpoint)
    text = tokenizer.decode(ids)
    assert tokenizer(text).input_ids == ids
    for bits, tokens in expected.items():
        made = bitstrata.generate(own, text, bits=bits, max_new_tokens=12, tokenizer=tokenizer)
        assert made.text == tokenizer.decode(tokens, skip_special_tokens=True)
    with Engine(own, tokenizer) as engine:
        handles = {bits: engine.submit(Request(ids, bits=bits, max_new_tokens=12)) for bits in expected}
        assert {bits: handle.result(WAIT) for bits, handle in handles.items()} == expected


def greedy(model, ids, bits):
    with torch.no_grad():
        made = model.generate(torch.tensor([ids]), bits=bits, max_new_tokens=12, do_sample=False)
    return made[0, len(ids) :].tolist()


def test_peft_itself_loads_and_makes_them(checkpoint, adapter, model, windows):
    expected = loss_of(bitstrata.load(checkpoint, bits=2, dtype=torch.float32, adapter=str(adapter)), windows[:4])
    config = bitstrata.lora_on_planes(model, peft.LoraConfig.from_pretrained(adapter))
    wrapped = peft.PeftModel.from_pretrained(model, adapter, config=config)
    assert loss_of(wrapped, windows[:4]) == pytest.approx(expected, abs=1e-5)
    assert loss_of(wrapped, windows[:4], bits=4) != pytest.approx(expected, abs=1e-3)
    with pytest.raises(UsageError, match="cannot be merged into planes"):
        wrapped.merge_and_unload()


def test_a_model_of_pages_is_resized_beside_its_adapter(checkpoint, adapter, windows):
    def plan(bits):
        return Plan.uniform(bitstrata.checkpoint.CheckpointReader(checkpoint).spec, bits)

    sized = bitstrata.load(checkpoint, plan=plan(2), adapter=adapter, dtype=torch.float32)
    whole = bitstrata.load(checkpoint, adapter=adapter, dtype=torch.float32)
    for bits in (2, 3):
        bitstrata.resize(sized, plan(bits))
        assert loss_of(sized, windows[:4]) == pytest.approx(loss_of(whole, windows[:4], bits=bits), abs=1e-5)


def test_what_planes_do_not_let_an_adapter_do(model, checkpoint, adapter, tmp_path, monkeypatch):
    for config, said in (
        (peft.LoraConfig(use_dora=True, target_modules=["q_proj"]), "DoRA"),
        (peft.LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"]), "'pissa' takes a part of W away"),
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3Config cannot be used"),
    ):
        with pytest.raises(UsageError, match=said):
            model.add_adapter(config)
    assert not any(isinstance(module, peft.tuners.lora.LoraLayer) for module in model.modules())
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in adapter.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[:900])
    with pytest.raises(InputError, match="damaged cannot be used"):
        bitstrata.load(checkpoint, adapter=damaged)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="not installed here"):
        bitstrata.load(checkpoint, adapter=adapter)


def test_an_adapter_of_another_model_is_named(checkpoint, windows, tmp_path):
    own = bitstrata.load(checkpoint, dtype=torch.float32)
    train(own, windows, peft.LoraConfig(r=4, target_modules=["q_proj"]), 1)
    folder = tmp_path / "wider"
    own.save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    held = load_file(weights)
    save_file({name: torch.cat([value, value], 1) for name, value in held.items()}, weights, {"format": "pt"})
    with pytest.raises(InputError, match="wider"):
        bitstrata.load(checkpoint, adapter=folder)
    save_file({name.replace("q_proj", "w_proj"): value for name, value in held.items()}, weights, {"format": "pt"})
    with pytest.raises(InputError, match=r"of another model: \d+ of its tensors"):
        bitstrata.load(checkpoint, adapter=folder)
