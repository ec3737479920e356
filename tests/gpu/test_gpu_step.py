"""A decoding step as one graph: the tokens of the model alone, whoever shares it, and what it must not do."""

from __future__ import annotations

import random

import architectures
import pytest
import torch
from page_orders import write_order
from pretended_gpu import Graph

import bitstrata
from bitstrata.nn import bits_state
from bitstrata.runtime import Engine, Request
from bitstrata.runtime.batching import Sampler, session_of
from bitstrata.runtime.batching import graph as graphs
from bitstrata.runtime.batching.attention import Span
from bitstrata.runtime.batching.forward import Forward
from bitstrata.runtime.batching.graph import GraphStep
from bitstrata.runtime.batching.memory import TokenPool

ONE_COPY = ["aten.copy_.default"]  # what a step asks of the host beside the launch


@pytest.fixture(autouse=True)
def no_gradient():
    with torch.no_grad():
        yield


@pytest.fixture
def model(checkpoint, gpu):
    return bitstrata.load(checkpoint, device=gpu, dtype=torch.float32)


@pytest.fixture
def here(checkpoint):
    """The same on the CPU, in float64."""
    return bitstrata.load(checkpoint, device="cpu", dtype=torch.float64)


class Running:
    """A model attached, its cache poisoned, and two ways through it."""

    def __init__(self, model, tokens=256):
        self.pool = TokenPool(tokens)
        self.forward = Forward(model, self.pool)
        self.state = bits_state(model)
        self.forward.check()
        self.layers = range(model.config.num_hidden_layers)
        self.poison()

    def poison(self):
        for held in self.held():
            held.fill_(torch.nan)

    def held(self):
        return [held for layer in self.layers for held in self.pool.layer(layer)]

    def run(self, tokens, spans, bits):
        return self.forward.run(tokens, spans, [self.state.resolve(one) for one in bits]).cpu()

    def modules(self, tokens, spans, bits):
        return self.forward._through_modules(tokens, spans, [self.state.resolve(one) for one in bits]).cpu()


@pytest.fixture
def running(model):
    made = Running(model)
    assert isinstance(made.forward._step, GraphStep), made.forward.reason
    yield made
    made.forward.detach()


def prompt_of(chance, length, vocabulary=60):
    return [chance.randrange(3, vocabulary) for _ in range(length)]


def alone(model, prompt, bits, new, **more):
    """The tokens of the model's own greedy generate."""
    ids = torch.tensor([prompt])
    settings = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False, **more}
    return model.generate(ids, bits=bits, max_new_tokens=new, **settings)[0, len(prompt) :].tolist()


def test_logits_and_cache_are_those_of_the_modules(running):
    """Requests of unequal length at unequal bits, one of them with several tokens, as drafts are; padding beside."""
    first, second, third = (running.pool.reserve(size) for size in (16, 64, 32))
    ids = [(7 * step) % 60 for step in range(80)]
    running.modules([ids[:40]], [Span(second.start, 0, 40)], [4])
    for past in range(2):
        batch = (
            [[5], [ids[40 + past]], ids[3 * past : 3 * past + 3]],
            [Span(first.start, past, 1), Span(second.start, 40 + past, 1), Span(third.start, 3 * past, 3)],
            [2, 4, 3],
        )
        found, caches = [], []
        for run in (running.run, running.modules):
            found.append(run(*batch))
            caches.append([held.cpu() for held in running.held()])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
        for one, other in zip(*caches, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("rows", [3, 9])
def test_padding_writes_nothing_and_a_row_is_the_same_in_any_company(running, rows):
    places = [running.pool.reserve(16) for _ in range(rows)]
    spans = [Span(place.start, 0, 1) for place in places]
    bits = [(2, 3, 4)[row % 3] for row in range(rows)]
    together = running.run([[5 + row] for row in range(rows)], spans, bits)
    assert together.shape[0] == rows
    assert together.isfinite().all()
    written = torch.tensor([place.start for place in places])
    for held in running.held():
        finite = held.cpu().isfinite().all(-1).all(0)
        assert finite.nonzero().flatten().tolist() == sorted(written.tolist())
    for row in (0, rows - 1):
        torch.testing.assert_close(
            running.run([[5 + row]], [spans[row]], [bits[row]])[0], together[row], rtol=1e-5, atol=1e-5
        )


def test_a_step_is_one_copy_and_one_replay(pretended, checkpoint):
    """Whatever the bits, the places and the lengths; another graph only for more rows."""
    running = Running(bitstrata.load(checkpoint, device="cuda:0", dtype=torch.float32))
    places = [running.pool.reserve(32) for _ in range(3)]
    known = set(running.forward._step._graphs)
    running.run([[5]] * 3, [Span(place.start, 0, 1) for place in places], [2, 3, 4])
    assert set(running.forward._step._graphs) - known == {(4, 256)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "captured", None)
        patch.setattr(running.forward, "_through_modules", None)
        for past in range(1, 4):
            spans, before = [Span(place.start, past, 1) for place in reversed(places)], Graph.replays
            bits = [running.state.resolve(one) for one in ((4, 4, 2), (3, 3, 3), (2, 4, 3))[past - 1]]
            pretended.waits.clear()
            running.forward.run([[past]] * 3, spans, bits)
            assert pretended.waits == ONE_COPY
            assert Graph.replays == before + 1


def count_passes(engine):
    """Tokens of each pass that goes through the modules, from now on."""
    passes, through = [], engine._forward._through_modules

    def counted(tokens, spans, bits, every):
        passes.append(sum(span.length for span in spans))
        return through(tokens, spans, bits, every)

    engine._forward._through_modules = counted
    return passes


def test_requests_that_come_and_go_make_their_own_tokens(model, here, seed):
    """At their own bits, with one that is cancelled, and one that takes up what another left in the cache."""
    chance = random.Random(seed)
    asked = [(prompt_of(chance, length), (2, 3, 4)[at % 3], 4 + at) for at, length in enumerate((20, 3, 9, 1, 26))]
    expected = [alone(here, *one) for one in asked]
    again = asked[0][0] + prompt_of(chance, 20)
    with Engine(model, max_requests=4) as engine:
        assert engine._forward.reason is None
        passes = count_passes(engine)
        endless = engine.submit(Request(prompt_of(chance, 5), bits=3, max_new_tokens=40, ignore_eos=True))
        handles = [engine.submit(Request(ids, bits=bits, max_new_tokens=new)) for ids, bits, new in asked]
        assert handles[0].result(120) == expected[0]
        endless.cancel()
        assert [handle.result(120) for handle in handles] == expected
        last = engine.submit(Request(again, bits=2, max_new_tokens=3))
        assert last.result(120) == alone(here, again, 2, 3)
        assert last.reused_tokens >= 16
        assert engine._forward.reason is None
    assert all(count > 16 for count in passes), "single tokens go through the graph"


def test_a_text_that_outgrows_the_cache(model, here, monkeypatch):
    """The tensors are others then, and the graphs of the old ones are not used again."""
    monkeypatch.setattr("bitstrata.runtime.batching.session.AMPLE", 32)
    monkeypatch.setattr("bitstrata.runtime.batching.continuation.GROWTH", 4)
    prompt = prompt_of(random.Random(3), 20)
    with session_of(model) as own:
        bits = bits_state(model).resolve(3)
        text = own.start(prompt, bits, most=20, sampler=Sampler(0.0, 1.0, random.Random()))
        versions = set()
        for _ in range(14):
            own.step(text, bits)
            versions.add(own._pool.version)
        assert own._forward.reason is None
        assert text.new == alone(here, prompt, 3, 14, eos_token_id=None)
        own.finish(text)
    assert len(versions) > 1


@pytest.fixture(scope="module", params=["mistral", "gemma2"])
def other(request, tmp_path_factory):
    """A checkpoint of another architecture; sliding windows are 16."""
    folder = tmp_path_factory.mktemp(request.param)
    architectures.save(request.param, folder / "source")
    settings = {"bits": "2,3,8", "method": "rtn", "group_size": 32, "device": "cpu"}
    bitstrata.quantize(folder / "source", folder / "out", **settings)
    return folder / "out"


def test_windows_caps_and_norms(other, gpu):
    model = bitstrata.load(other, device=gpu, dtype=torch.float32)
    here = bitstrata.load(other, device="cpu", dtype=torch.float64)
    chance = random.Random(5)
    asked = [(prompt_of(chance, length), bits, 5) for length, bits in ((30, 2), (12, 8), (1, 3))]
    with Engine(model) as engine:
        assert engine._forward.reason is None
        handles = [engine.submit(Request(ids, bits=bits, max_new_tokens=new)) for ids, bits, new in asked]
        assert [handle.result(120) for handle in handles] == [alone(here, *one) for one in asked]


def test_a_resized_model_runs_its_new_pages(gpu, checkpoint):
    write_order(checkpoint)
    model = bitstrata.load(checkpoint, plan=2, device=gpu, dtype=torch.float32)
    running = Running(model)
    place = running.pool.reserve(16)
    batch = [[5, 6, 7]], [Span(place.start, 0, 3)], [None]
    found = []
    for plan in (2, 4):
        model.resize(plan)
        found.append(running.run(*batch))
        torch.testing.assert_close(found[-1], running.modules(*batch), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(*found, rtol=0.01)
    assert isinstance(running.forward._step, GraphStep)


def test_what_cannot_be_recorded_takes_the_modules(model, monkeypatch):
    def reason():
        made = Running(model)
        made.forward.detach()
        assert made.forward._step is None
        return made.forward.reason

    block = model.model.layers[1]
    hook = block.mlp.register_forward_hook(lambda *_: None)
    assert "hooks" in reason()
    hook.remove()
    forward = block.mlp.forward
    with monkeypatch.context() as patch:  # what is in a graph must not depend on what a tensor holds
        patch.setattr(block.mlp, "forward", lambda x: forward(x) if bool(x.isfinite().all()) else x, raising=False)
        assert "the host waits for the device at" in reason()
    turns = []

    def drifting(x):  # Python decides, once and for all replays
        turns.append(None)
        return forward(x) * (1 if len(turns) <= 6 else 1.5)

    with monkeypatch.context() as patch:
        patch.setattr(block.mlp, "forward", drifting, raising=False)
        assert "its logits differ from the modules'" in reason()


def test_a_graph_that_cannot_be_made_later_is_no_error(running, monkeypatch):
    place = running.pool.reserve(16)
    batch = [[5]], [Span(place.start, 0, 1)], [3]
    expected = running.modules(*batch)

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graphs, "captured", no_memory)
    torch.testing.assert_close(running.run(*batch), expected)
    assert "of 1 rows ends with" in running.forward.reason
    assert running.forward._step is None


def test_the_graph_that_was_not_used_for_longest_makes_room(running, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 2)
    running.forward._step._graphs.clear()
    places = [running.pool.reserve(16) for _ in range(4)]
    for rows in (1, 2, 1, 4):
        running.run([[5]] * rows, [Span(place.start, 0, 1) for place in places[:rows]], [3] * rows)
    assert [rows for rows, _ in running.forward._step._graphs] == [1, 4]
