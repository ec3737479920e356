"""Resizing while requests run: nothing is lost, and every step is computed at one plan from end to end."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from page_orders import write_order
from tiny_models import tiny_llama

import bitstrata
from bitstrata.checkpoint import CheckpointReader
from bitstrata.demonstration.run import MODEL
from bitstrata.errors import CheckpointError, UnsupportedBitsError, UsageError
from bitstrata.models import load_tokenizer
from bitstrata.nn import PlaneLinear, bits_state
from bitstrata.plans import ModelSizes
from bitstrata.runtime import Conversation, Engine, Request

WAIT = 120
RESIZES = 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("bundled") / "out"
    bitstrata.quantize(MODEL, output, bits="2-6", method="rtn")
    write_order(output)
    return output


@pytest.fixture(scope="module")
def sizes(folder):
    return ModelSizes.of(CheckpointReader(folder), torch.float32)


@pytest.fixture(scope="module")
def whole(folder):
    return bitstrata.load(folder, dtype=torch.float32)


@pytest.fixture
def model(folder):
    return bitstrata.load(folder, plan=4, dtype=torch.float32)


def random_size(draw, sizes):
    """A plan, a budget, or uniform bits."""
    low, high = (sizes.of_plan(plan).total for plan in (sizes.smallest, sizes.largest))
    return draw.choice(
        [
            lambda: {name: draw.choice(list(held)) for name, held in sizes.layers.items()},
            lambda: f"{draw.randint(low, high)}B",
            lambda: draw.randint(2, 6),
        ]
    )()


class Watch:
    """Notes the plan of every step of a model, and whether all of its layers ran at it."""

    def __init__(self, model):
        self.steps, self.torn, self._now = [], [], threading.local()
        self.state = bits_state(model)
        model.register_forward_pre_hook(self.before)
        model.register_forward_hook(self.after)
        for layer in model.modules():
            if isinstance(layer, PlaneLinear) and layer.name:
                layer.register_forward_pre_hook(self.layer)

    def before(self, *_):
        self._now.seen = {}

    def layer(self, layer, _):
        self._now.seen[layer.name] = layer.bits, dict(self.state.plan)

    def after(self, *_):
        seen, self._now.seen = self._now.seen, {}
        plans = [plan for _, plan in seen.values()]
        self.steps.append(plans[0])
        if any(plan != plans[0] for plan in plans) or any(
            (plans[0][name],) != bits for name, (bits, _) in seen.items()
        ):
            self.torn.append(seen)


def test_a_thousand_resizes_under_concurrent_requests_lose_nothing(tmp_path, seed):
    folder = tmp_path / "out"
    bitstrata.quantize(tiny_llama(tmp_path / "source"), folder, bits="2-6", method="rtn")
    write_order(folder)
    model, whole, sizes = (
        bitstrata.load(folder, plan=4),
        bitstrata.load(folder),
        ModelSizes.of(CheckpointReader(folder)),
    )
    draw, watch = random.Random(seed), Watch(model)
    handles, resizes = [], 0

    def request(index):
        return Request([1 + index % 50, 7, 9], max_new_tokens=20, ignore_eos=True, temperature=0.5 * (index % 2))

    with Engine(model, None, max_requests=4) as engine:
        while resizes < RESIZES or any(handle.finished is None for handle in handles):
            if resizes < RESIZES and sum(handle.finished is None for handle in handles) < 8:
                handles += [engine.submit(request(len(handles) + more)) for more in range(4)]
            model.resize(random_size(draw, sizes))
            resizes += 1
        assert engine.stats().finished["length"] == len(handles) >= 8
    assert all(len(handle.tokens) == 20 and handle.finished.reason == "length" for handle in handles)
    assert not watch.torn
    assert len({tuple(plan.items()) for plan in watch.steps}) > 10, "the plan changed between steps"
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids, bits=dict(bits_state(model).plan)).logits)


def test_every_step_is_what_the_whole_model_computes_at_its_plan(model, whole, sizes, seed):
    """One sequence, decoded while another thread resizes; then replayed on the whole model, plan by plan."""
    draw, watch, end = random.Random(seed), Watch(model), threading.Event()

    def resizing():
        while not end.is_set():
            model.resize(random_size(draw, sizes))

    thread = threading.Thread(target=resizing, daemon=True)
    thread.start()
    fed, results, cache = [torch.tensor([[3, 1, 4, 1, 5]])], [], None
    with torch.no_grad():
        for _ in range(60):
            output = model(fed[-1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            results.append(output.logits)
            fed.append(output.logits[:, -1:].argmax(-1))
        end.set()
        thread.join(WAIT)
        assert not watch.torn
        cache = None
        for ids, logits, plan in zip(fed, results, watch.steps, strict=False):
            output = whole(ids, past_key_values=cache, use_cache=True, bits=plan)
            cache = output.past_key_values
            assert torch.equal(output.logits, logits)
    assert len({tuple(plan.items()) for plan in watch.steps}) > 1


def test_two_resizes_at_a_time_and_two_callers(model, whole, sizes, seed):
    """Threads that resize take turns; threads that run the model do not wait for each other."""
    watch, errors = Watch(model), []

    def repeat(action, count):
        def run():
            try:
                for index in range(count):
                    action(index)
            except Exception as error:
                errors.append(error)

        return threading.Thread(target=run, daemon=True)

    def resizer(number):
        draw = random.Random(seed + number)
        return lambda index: model.resize(random_size(draw, sizes))

    def caller(index):
        with torch.no_grad():
            assert model(torch.tensor([[1, 2, index]])).logits.isfinite().all()

    threads = [repeat(resizer(number), 60) for number in range(2)] + [repeat(caller, 40) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive()
    assert not errors
    assert not watch.torn
    assert len(watch.steps) == 80


def test_a_resize_that_fails_disturbs_no_request(model, folder, monkeypatch):
    with Engine(model, None) as engine:
        handle = engine.submit(Request([1, 2, 3], max_new_tokens=30, ignore_eos=True))
        monkeypatch.setattr(
            "bitstrata.plans.page_reader._File.read", lambda *_: (_ for _ in ()).throw(CheckpointError("broken"))
        )
        with pytest.raises(CheckpointError, match="broken"):
            model.resize(6)
        monkeypatch.undo()
        assert len(handle.result(WAIT)) == 30
        assert set(bits_state(model).plan.values()) == {4}


def test_requests_run_the_plan_in_memory(model, sizes, seed):
    with Engine(model, None) as engine:
        same = [
            engine.submit(Request([1, 2, 3], bits=bits, max_new_tokens=8, ignore_eos=True)).result(WAIT)
            for bits in (None, 4, dict(bits_state(model).plan))
        ]
        assert same[0] == same[1] == same[2]
        for bits in (3, dict.fromkeys(sizes.layers, 3)):
            with pytest.raises(UsageError, match="in memory"):
                engine.submit(Request([1, 2, 3], bits=bits))
        handle = engine.submit(Request([1, 2, 3], max_new_tokens=8))
        with pytest.raises(UnsupportedBitsError, match="in memory"):
            handle.set_bits(3)
        tokens = [event for event in handle.events(WAIT) if hasattr(event, "id")]
        assert {token.bits for token in tokens} == {None}
        model.resize(3)
        assert engine.submit(Request([1, 2, 3], bits=3, max_new_tokens=2)).result(WAIT)


def test_a_request_that_named_the_bits_goes_along_with_a_resize(model):
    with Engine(model, None) as engine:
        handle = engine.submit(Request([1, 2, 3], bits=4, max_new_tokens=200, ignore_eos=True))
        next(handle.events(WAIT))
        model.resize(3)
        assert len(handle.result(WAIT)) == 200


def test_a_listener_may_resize(model):
    """It runs between two steps, in the engine's thread."""
    with Engine(model, None) as engine:
        handle = engine.submit(
            Request([1, 2, 3], max_new_tokens=5, ignore_eos=True), lambda event: model.resize(2) and None
        )
        assert len(handle.result(WAIT)) == 5
    assert set(bits_state(model).plan.values()) == {2}


def test_a_resize_from_inside_a_step_is_refused(model):
    layer = next(layer for layer in model.modules() if isinstance(layer, PlaneLinear) and layer.name)
    hook = layer.register_forward_hook(lambda *_: model.resize(2) and None)
    with pytest.raises(UsageError, match="inside its own forward"), torch.no_grad():
        model(torch.tensor([[1, 2]]))
    hook.remove()
    model.resize(2)


def test_a_resize_from_inside_a_step_does_not_wait_for_one_that_waits_for_the_step(model):
    layer = next(layer for layer in model.modules() if isinstance(layer, PlaneLinear) and layer.name)
    state, refused = bits_state(model), []

    def inside(*_):
        other = threading.Thread(target=lambda: model.resize(3), daemon=True)
        other.start()
        while not state._uses._is_changing:
            pass
        try:
            model.resize(2)
        except UsageError as error:
            refused.append(error)

    hook = layer.register_forward_hook(inside)
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))
    hook.remove()
    model.resize(5)
    assert len(refused) == 1
    assert set(state.plan.values()) == {5}


def test_generate_and_its_bits(model):
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, bits=4), expected)
        with pytest.raises(UnsupportedBitsError):
            model.generate(ids, max_new_tokens=4, bits=3)
        with pytest.raises(UsageError, match="plan"):
            model.generate(ids, max_new_tokens=4, draft_bits=2)


def test_a_conversation_runs_the_plan_in_memory(model):
    talk = Conversation(model, load_tokenizer(MODEL), max_new_tokens=4)
    assert talk.bits is bits_state(model).plan
    assert talk.reply("def f").bits == "4"
    model.resize(3)
    talk.bits = 3
    model.resize("9MB")
    assert talk.reply("def f").bits == "9MB"
    with pytest.raises(UnsupportedBitsError):
        talk.bits = 2
