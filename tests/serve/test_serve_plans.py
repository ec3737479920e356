"""Plans by name, a model that holds one plan's pages, and what a policy may do with requests that do not say."""

from __future__ import annotations

import pytest
import torch
from http_calls import COMPLETIONS, served

import bitstrata
from bitstrata.checkpoint import Fingerprint
from bitstrata.errors import PlanError, UnsupportedBitsError, UsageError
from bitstrata.plans import Plan
from bitstrata.runtime import Engine, PositionPolicy, Request
from bitstrata.serve.app import create_app
from bitstrata.serve.settings import Settings

ASK = {"prompt": "import os\n\ndef walk(", "max_tokens": 12, "temperature": 0, "return_token_ids": True}


@pytest.fixture(scope="module")
def plan(model) -> Plan:
    """Layers at 2, 3 and 4 bits in turn."""
    layers = bitstrata.nn.bits_state(model).layers
    return Plan({layer: 2 + number % 3 for number, layer in enumerate(layers)}, name="mixed")


@pytest.fixture(scope="module")
def planned(checkpoint, tokenizer, plan):
    """The model's own greedy tokens at the plan."""
    own = bitstrata.load(checkpoint, dtype=torch.float32)
    ids = torch.tensor([tokenizer(ASK["prompt"]).input_ids])
    with torch.no_grad():
        output = own.generate(ids, bits=plan, max_new_tokens=ASK["max_tokens"], do_sample=False, pad_token_id=0)
    return output[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("asked", [{"model": "small:thrifty"}, {"bits": "thrifty"}])
def test_a_plan_is_chosen_by_its_name(serving, plan, planned, asked):
    with serving(plans={"thrifty": plan}) as server:
        reply = server.post(COMPLETIONS, {**ASK, **asked}).json
        assert reply["choices"][0]["token_ids"] == planned
        assert reply["bits"] is None
        assert reply["usage"]["bits"] == {"thrifty": len(planned)}
        assert 'bits="thrifty"' in server.get("/metrics").body.decode()


def test_the_list_of_models_has_plans(serving, plan):
    with serving(plans={"thrifty": plan}) as server:
        cards = {card["id"]: card for card in server.get("/v1/models").json["data"]}
    assert list(cards) == ["small", "small:2", "small:3", "small:4", "small:thrifty"]
    assert cards["small:thrifty"]["bits"] is None
    read = [cards[name]["bytes_per_token"] for name in ("small:2", "small:thrifty", "small:4")]
    assert read[0] < read[1] < read[2]


def test_a_plan_can_be_the_default(serving, plan, planned):
    with serving(plans={"thrifty": plan}, bits="thrifty") as server:
        reply = server.post(COMPLETIONS, ASK).json
        assert reply["choices"][0]["token_ids"] == planned
        assert reply["usage"]["bits"] == {"thrifty": len(planned)}
        assert server.post(COMPLETIONS, {**ASK, "bits": 4}).json["bits"] == 4


def test_names_that_are_not_there(serving, plan):
    with serving(plans={"thrifty": plan}) as server:
        server.post(COMPLETIONS, {**ASK, "model": "small:lavish"}).refused(404, "lavish", "small:thrifty")
        server.post(COMPLETIONS, {**ASK, "bits": "lavish"}).refused(400, "lavish", "2, 3, 4, thrifty", param="bits")
        server.post(COMPLETIONS, {**ASK, "bits": "3333"}).refused(400, "whole number", param="bits")
        server.post(COMPLETIONS, {**ASK, "model": "small:thrifty", "bits": 3}).refused(400, "thrifty", "3")
        server.post(COMPLETIONS, {**ASK, "bits": "thrifty", "min_bits": 2}).refused(400, "min_bits", "plan")
        server.post(COMPLETIONS, {**ASK, "min_bits": 1}).refused(400, "min_bits=1", "2, 3, 4", param="min_bits")


def test_settings_that_do_not_fit_the_model(engine, tokenizer, plan):
    with pytest.raises(UnsupportedBitsError, match="7"):
        create_app(engine, tokenizer, Settings("small", bits=7))
    with pytest.raises(UsageError, match="min_bits=7"):
        create_app(engine, tokenizer, Settings("small", min_bits=7))
    with pytest.raises(UsageError, match="'thrifty'"):
        create_app(engine, tokenizer, Settings("small", bits="thrifty"))
    foreign = Plan(dict.fromkeys(engine.limits.state.layers, 2), Fingerprint(layout="0" * 64), name="foreign")
    with pytest.raises(PlanError, match="another model"):
        create_app(engine, tokenizer, Settings("small", plans={"other": foreign}))
    with pytest.raises(PlanError, match="another model"):
        engine.submit(Request([1], bits=foreign))
    with pytest.raises(UsageError, match="plan"):
        create_app(engine, tokenizer, Settings("small", plans={"other": Plan({"lm_head": 2})}))


def test_a_model_with_one_plans_pages(checkpoint, tokenizer, plan, planned):
    model = bitstrata.load(checkpoint, plan=plan, dtype=torch.float32)
    with Engine(model, tokenizer) as engine:
        with served(create_app(engine, tokenizer, Settings("small")), engine) as server:
            assert [card["id"] for card in server.get("/v1/models").json["data"]] == ["small"]
            reply = server.post(COMPLETIONS, ASK).json
            assert reply["choices"][0]["token_ids"] == planned
            assert reply["usage"]["bits"] == {"mixed": len(planned)}
            server.post(COMPLETIONS, {**ASK, "bits": 4}).refused(400, "one plan's pages", code="unsupported_bits")
            server.post(COMPLETIONS, {**ASK, "min_bits": 2}).refused(400, "min_bits=2", param="min_bits")
        with pytest.raises(UsageError, match="one plan's pages"):
            create_app(engine, tokenizer, Settings("small", bits=4))


def test_min_bits_of_the_server_are_for_requests_that_say_none(checkpoint, tokenizer):
    model = bitstrata.load(checkpoint, dtype=torch.float32)
    with (
        Engine(model, tokenizer, policy=PositionPolicy(tokens=4)) as engine,
        served(create_app(engine, tokenizer, Settings("small", min_bits=3)), engine) as server,
    ):

        def bits(**asked):
            return server.post(COMPLETIONS, {**ASK, "ignore_eos": True, **asked}).json["usage"]["bits"]

        assert bits() == {"4": 4, "3": 8}
        assert bits(min_bits=2) == {"4": 4, "3": 4, "2": 4}
        assert bits(min_bits=4) == {"4": 12}
        assert bits(bits=2) == {"2": 12}, "below the server's least only because it was asked for"
