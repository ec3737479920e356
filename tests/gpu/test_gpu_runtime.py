"""Everything that runs a checkpoint, with device cuda, beside the same on the CPU in exact arithmetic."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from pretended_gpu import on_a_real_one

import bitstrata
from bitstrata.cli.main import run as command
from bitstrata.kernels.triton import TiledWeight
from bitstrata.models import load_tokenizer
from bitstrata.nn import PlaneLinear
from bitstrata.runtime import Engine, Request
from bitstrata.runtime.conversation import Conversation

PROMPT = "the cat"


@pytest.fixture
def models(gpu, checkpoint):
    """The checkpoint on the GPU in fp32, and on the CPU in float64, which only the reference kernel computes in."""
    there = bitstrata.load(checkpoint, device=gpu, dtype=torch.float32)
    return there, bitstrata.load(checkpoint, device="cpu", dtype=torch.float64)


def test_layers_hold_the_layout_of_the_gpu_and_give_the_stored_tensors_back(models):
    there, here = models
    assert there.device.type == "cuda"
    assert all(isinstance(m.packed, TiledWeight) for m in there.modules() if isinstance(m, PlaneLinear))
    expected = here.state_dict()
    for name, tensor in there.state_dict().items():
        assert torch.equal(tensor.cpu(), expected[name]), name
    there.to("cpu")
    assert not any(isinstance(m.packed, TiledWeight) for m in there.modules() if isinstance(m, PlaneLinear))
    for name, tensor in there.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("bits", [2, torch.tensor([2, 4]), torch.tensor([[2, 3, 4], [4, 4, 2]])], ids=str)
def test_logits(models, gpu, bits):
    there, here = models
    ids = torch.arange(3, 9).view(2, 3)
    on_gpu = bits.to(gpu) if isinstance(bits, torch.Tensor) else bits
    with torch.no_grad():
        expected = here(ids, bits=bits).logits.float()
        for given in (bits, on_gpu):  # a tensor of bits may come from either side
            torch.testing.assert_close(there(ids.to(gpu), bits=given).logits.cpu(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"draft_bits": 2}, {"temperature": 0.8}], ids=str)
def test_generate(models, settings):
    there, here = models
    text = bitstrata.generate(there, PROMPT, max_new_tokens=6, **settings).text
    if "temperature" not in settings:  # devices draw other random numbers
        assert text == bitstrata.generate(here, PROMPT, max_new_tokens=6, **settings).text


@on_a_real_one
def test_a_conversation(models):
    replies = [
        Conversation(model, load_tokenizer(model.name_or_path), max_new_tokens=4).reply("hi").text for model in models
    ]
    assert replies[0] == replies[1]


@on_a_real_one
@pytest.mark.parametrize("bits", [2, 3, torch.tensor([4])], ids=str)
def test_generate_with_a_static_cache(models, gpu, bits):
    """On a real GPU transformers compiles the decoding step for it, CUDA graphs included."""
    there, here = models
    ids = torch.tensor([[0, 5, 9, 11]])
    static = {"cache_implementation": "static"}
    made = [
        model.generate(
            ids.to(model.device),
            attention_mask=torch.ones_like(ids).to(model.device),
            bits=bits.to(model.device) if isinstance(bits, torch.Tensor) else bits,
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            **cache,
        ).tolist()
        for model, cache in ((there, static), (here, {}))
    ]
    assert made[0] == made[1]


def test_the_engine(models):
    requests = [
        Request(
            [0, *((7 * at + place) % 60 + 3 for place in range(3 + 5 * at))],
            bits=(2, 4, 3)[at % 3],
            max_new_tokens=6,
            temperature=0.8 if at == 4 else 0.0,
            seed=at,
            logprobs=2 if at == 1 else None,
        )
        for at in range(6)
    ]
    made = []
    for model in models:
        with Engine(model, max_requests=8) as engine:
            made.append([handle.result(120) for handle in [engine.submit(request) for request in requests]])
    assert made[0] == made[1]


def test_evaluate_and_the_command_line(gpu, checkpoint, source, text, capfd):
    arguments = ("eval", str(checkpoint), "--text", str(text), "--reference", str(source), "--json")
    results = []
    for device in (gpu, "cpu"):
        capfd.readouterr()
        assert command([*arguments, "--device", device], debug=False) == 0, capfd.readouterr().err
        results.append(json.loads(capfd.readouterr().out)["results"])
    for mine, expected in zip(*results, strict=True):
        assert mine["nll"] == pytest.approx(expected["nll"], rel=1e-3)
        assert mine["kld"] == pytest.approx(expected["kld"], rel=1e-2)
    assert command(["generate", str(checkpoint), PROMPT, "--max-new-tokens", "4", "--device", gpu], debug=False) == 0


def test_kernels_run_on_the_device_of_the_tensors(pretended, checkpoint, monkeypatch):
    """Triton would launch on the current one."""
    entered = []

    @contextlib.contextmanager
    def device(wanted):
        entered.append(wanted)
        yield

    model = bitstrata.load(checkpoint, device="cuda:0", dtype=torch.float32)
    ids = torch.tensor([[0, 5]], device="cuda:0")
    monkeypatch.setattr(torch.cuda, "device", device)
    model(ids)
    assert entered == []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    model(ids)
    assert set(entered) == {torch.device("cuda:0")}
    assert len(entered) >= 15  # seven layers in each of two blocks, and the head


def test_the_pretended_device_is_as_strict_as_a_real_one(pretended):
    """What these tests rest on: a CPU-only assumption fails."""
    there = torch.arange(6.0, device="cuda:0").view(2, 3)
    here = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises(RuntimeError, match="address"):
        there.data_ptr()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device="cuda:0", generator=torch.Generator())
    with pytest.raises(RuntimeError, match="indices on cuda"):
        here[there.long()[0]]
    assert not pretended.waits
    assert there.sum().item() == 15.0
    assert (there[[1, 0]].cpu() == torch.tensor([[3.0, 4, 5], [0, 1, 2]])).all()
    assert len(pretended.waits) == 2
