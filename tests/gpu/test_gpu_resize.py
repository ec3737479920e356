"""A model of pages on a device: resized there, it computes what a fresh load there computes."""

from __future__ import annotations

import pytest
import torch
from page_orders import write_order
from pretended_gpu import on_a_real_one

import bitstrata
from bitstrata.checkpoint import CheckpointReader
from bitstrata.errors import ResourceError
from bitstrata.kernels.triton import TiledWeight
from bitstrata.nn import PlaneLinear, bits_state
from bitstrata.plans import ModelSizes
from bitstrata.runtime import Engine, Request

IDS = torch.arange(3, 9).view(2, 3)


@pytest.fixture(scope="module")
def sizes(checkpoint):
    write_order(checkpoint)
    return ModelSizes.of(CheckpointReader(checkpoint))


@pytest.fixture
def plans(sizes):
    """Three plans: mixed, mixed otherwise, and uniform."""
    names = list(sizes.layers)
    return [{name: 2 + (at * step) % 3 for at, name in enumerate(names)} for step in (1, 2)] + [dict.fromkeys(names, 4)]


def logits(model):
    with torch.no_grad():
        return model(IDS.to(model.device)).logits.cpu()


def test_after_a_resize_it_is_a_fresh_load(gpu, checkpoint, plans):
    model = bitstrata.load(checkpoint, plan=2, device=gpu, dtype=torch.float32)
    here = bitstrata.load(checkpoint, device="cpu", dtype=torch.float64)
    for plan in [*plans, plans[0]]:
        model.resize(plan)
        assert all(isinstance(m.packed, TiledWeight) for m in model.modules() if isinstance(m, PlaneLinear))
        assert all(tensor.device.type == "cuda" for tensor in model.buffers())
        fresh = bitstrata.load(checkpoint, plan=plan, device=gpu, dtype=torch.float32)
        assert torch.equal(logits(model), logits(fresh))
        with torch.no_grad():
            torch.testing.assert_close(logits(model), here(IDS, bits=plan).logits.float(), atol=1e-4, rtol=1e-4)


def test_a_budget_and_another_device(gpu, checkpoint, sizes):
    model = bitstrata.load(checkpoint, budget="1MB", device=gpu, dtype=torch.float32)
    assert dict(bits_state(model).plan) == sizes.largest
    model.to("cpu")
    model.resize(3)
    assert torch.equal(logits(model), logits(bitstrata.load(checkpoint, plan=3, device="cpu", dtype=torch.float32)))


@on_a_real_one
def test_requests_go_on_while_it_is_resized(gpu, checkpoint, plans):
    model = bitstrata.load(checkpoint, plan=3, device=gpu, dtype=torch.float32)
    with Engine(model, None) as engine:
        handles = [engine.submit(Request([5, 6, 7 + at], max_new_tokens=12, ignore_eos=True)) for at in range(4)]
        for at in range(20):
            model.resize(plans[at % len(plans)])
        assert [len(handle.result(60)) for handle in handles] == [12] * 4


def test_fit_asks_the_device_for_its_free_memory(gpu, checkpoint, sizes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300 << 20, 1 << 33))
    model = bitstrata.load(checkpoint, fit=True, device=gpu)
    assert dict(bits_state(model).plan) == sizes.largest
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (200 << 20, 1 << 33))
    with pytest.raises(ResourceError, match=r"209.72 MB free on cuda"):
        bitstrata.load(checkpoint, fit=True, device=gpu)
