"""What a graph of a decoding step needs: one trace without a break, nothing that the host waits for, bits as data."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from helpers import random_weight
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig, StaticCache

import bitstrata
from bitstrata.errors import UnsupportedBitsError
from bitstrata.kernels.triton import KERNEL, TiledWeight

PROMPT = torch.tensor([[0, 5, 9, 11]])
STEPS = 3


@pytest.fixture
def model(checkpoint):
    return bitstrata.load(checkpoint, device="cpu", dtype=torch.float32)


@pytest.fixture
def counter():
    """A compiler that counts its graphs."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def decoded(model, step, bits):
    """Logits of STEPS greedy steps over a static cache; the prompt runs in `model`, the steps in `step`."""
    cache = StaticCache(config=model.config, max_cache_len=16)
    outputs = []
    with torch.no_grad():
        logits = model(PROMPT, past_key_values=cache, use_cache=True, bits=bits).logits
        for _ in range(STEPS):
            token = logits[:, -1:].argmax(-1)
            logits = step(token, past_key_values=cache, use_cache=True, bits=bits).logits
            outputs.append(logits)
    return torch.cat(outputs, 1)


def test_a_step_over_a_static_cache_is_one_graph_for_each_bits(model, counter):
    step = torch.compile(model, fullgraph=True, backend=counter)
    for bits in (4, 2, 4):
        torch.testing.assert_close(decoded(model, step, bits), decoded(model, model, bits))
    assert counter.frame_count == 2


@pytest.mark.parametrize("shape", [(1,), ()], ids=["one-a-sequence", "one-for-all"])
def test_with_bits_in_a_tensor_there_is_one_graph_for_all(model, counter, shape):
    step, bits = torch.compile(model, fullgraph=True, backend=counter), torch.full(shape, 4)
    for value in (4, 2, 3):
        bits.fill_(value)
        torch.testing.assert_close(decoded(model, step, bits), decoded(model, model, value))
    assert counter.frame_count == 1


def test_generate_with_a_static_cache_at_any_bits(model, counter):
    """transformers compiles the step; on CPUs only when told to."""

    def backend(*arguments):  # transformers copies what it is given, but not functions
        return counter(*arguments)

    config = CompileConfig(backend=backend, fullgraph=True, mode=None)
    config._compile_all_devices = True
    settings = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": STEPS, "do_sample": False}
    settings["pad_token_id"] = 0
    for bits in (4, torch.tensor([2]), torch.tensor([3])):
        expected = model.generate(PROMPT, bits=bits, **settings)
        static = {"cache_implementation": "static", "compile_config": config}
        assert torch.equal(model.generate(PROMPT, bits=bits, **settings, **static), expected)
    assert counter.frame_count == 2  # one for an int, and one for tensors


def test_a_step_waits_for_nothing(pretended, checkpoint):
    model = bitstrata.load(checkpoint, device="cuda:0", dtype=torch.float32)
    cache = StaticCache(config=model.config, max_cache_len=16)
    row_bits = torch.tensor([3], device="cuda:0")
    with torch.no_grad():
        token = model(PROMPT.to("cuda:0"), past_key_values=cache, bits=2).logits[:, -1:].argmax(-1)
        for bits in (2, row_bits, row_bits[0]):
            pretended.waits.clear()
            token = model(token, past_key_values=cache, bits=bits).logits[:, -1:].argmax(-1)
            assert pretended.waits == []
        token.tolist()
    assert len(pretended.waits) == 1


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (Linux only)")
@pytest.mark.parametrize("scales", ["affine", "affine8", "codebook"])
def test_launching_a_kernel_waits_for_nothing(pretended, scales, seed):
    from bitstrata.kernels.triton import launch
    from bitstrata.kernels.triton.tiled import FEW_ROWS

    weight = TiledWeight.pack(random_weight(19, 269, (2, 3, 4), 64, scales, seed), KERNEL)
    planes = tuple(plane.to("cuda:0") for plane in weight.planes)
    scales = {bits: tensor.to("cuda:0") for bits, tensor in weight.scales.items()}
    there = TiledWeight(planes, scales, 19, 269, 64, weight.kind, KERNEL)
    index, launched = torch.tensor([3, 5], device="cuda:0"), []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append((self.name, grid))

    with pytest.MonkeyPatch.context() as patch:
        for name in ("few_rows_affine", "few_rows_codebook", "many_rows", "decode_rows"):
            patch.setattr(launch, name, Recorder(name))
        pretended.waits.clear()
        for rows in (1, 9, 40):
            x = torch.ones(rows, 269, dtype=torch.bfloat16, device="cuda:0")
            one = launch.few_rows if rows <= FEW_ROWS else launch.tiles
            assert one(x, there, 3).shape == (rows, 19)
            assert launch.few_rows(x, there, torch.full((rows,), 3, device="cuda:0")).shape == (rows, 19)
        launch.decode(there, 2, torch.bfloat16, index)
    assert len(launched) == 7
    assert pretended.waits == []


def test_bits_that_are_not_there(pretended, checkpoint):
    """The host refuses what it knows; what only the device knows becomes NaN."""
    model = bitstrata.load(checkpoint, device="cuda:0", dtype=torch.float32)
    with pytest.raises(UnsupportedBitsError):
        model(PROMPT.to("cuda:0"), bits=7)
    logits = model(PROMPT.to("cuda:0"), bits=torch.tensor([7], device="cuda:0")).logits
    assert logits.isnan().all()
