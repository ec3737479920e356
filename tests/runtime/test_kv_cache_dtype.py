"""Keys and values in int8 and int4: the native step and the modules read the same, whoever wrote it, in any company."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import ISAS
from transformers import AutoConfig, AutoModelForCausalLM

import bitstrata
from bitstrata.errors import BatchError, ResourceError, UsageError
from bitstrata.kernels.cached import BITS, head_bytes
from bitstrata.kernels.cpu.extension import native
from bitstrata.nn import bits_state
from bitstrata.runtime import Conversation, Engine, Request
from bitstrata.runtime.batching import memory, session_of
from bitstrata.runtime.batching.attention import FlatBatch, Span, attend
from bitstrata.runtime.batching.forward import Forward
from bitstrata.runtime.batching.memory import TokenPool
from bitstrata.runtime.batching.stored import Stored

KINDS = [kind for kind in BITS if kind != "auto"]
HISTORIES = [1, 15, 16, 17, 600]
needs_native = pytest.mark.skipif(native is None, reason="the native kernels are not built")


def load(folder, kind="llama", **settings):
    torch.manual_seed(1)
    shared = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 80,
        "vocab_size": 90,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**shared, **settings})).float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "source")
    bitstrata.quantize(folder / "source", folder / "out", bits="2,4", method="rtn", group_size=32)
    return bitstrata.load(folder / "out", dtype=torch.float32)


def run(forward, tokens, past, start, bits=4):
    span = Span(start, past, len(tokens))
    return forward.run([tokens], [span], [bits_state(forward.model).resolve(bits)])


def attached(model, kind, tokens=1024):
    """Its cache poisoned: what is read before it was written makes logits NaN."""
    forward = Forward(model, TokenPool(tokens, kind))
    forward.check()
    for layer in range(2):
        for codes, meaning in (one.tensors for one in forward.pool.stored(layer)):
            codes.fill_(255)
            meaning.fill_(torch.nan)
    return forward


@pytest.fixture
def no_gradient():
    with torch.no_grad():
        yield


SHAPES = {
    "64": ("llama", {"head_dim": 64}),
    "96": ("llama", {"head_dim": 96, "num_key_value_heads": 3}),
    "128": ("llama", {"head_dim": 128, "hidden_size": 40, "num_attention_heads": 10}),  # five queries a head
    "256": ("llama", {"head_dim": 256, "num_key_value_heads": 6}),
    "80": ("llama", {"head_dim": 80}),
    "20": ("qwen3", {"head_dim": 20}),  # of no whole vector
    "window": ("mistral", {"head_dim": 24, "sliding_window": 20}),
    "cap": ("gemma2", {"head_dim": 12, "sliding_window": 20, "query_pre_attn_scalar": 7}),
}


@needs_native
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("no_gradient", "exact_kernel")
def test_the_native_step_writes_and_reads_what_the_modules_do(shape, tmp_path, monkeypatch):
    name, settings = SHAPES[shape]
    model = load(tmp_path, name, **settings)
    ids = [(7 * step) % 90 for step in range(700)]
    for kind in KINDS:
        forward = attached(model, kind)
        step = forward._native
        assert step is not None, forward.reason
        start = forward.pool.reserve(1024).start
        for past in HISTORIES:
            forward._native = None
            run(forward, ids[:past], 0, start)  # few tokens too: by the modules
            run(forward, ids[past : past + 3], past, start)
            places = slice(start + past, start + past + 3)
            wrote = [[side.read(places).clone() for side in forward.pool.stored(layer)] for layer in range(2)]
            forward._native = step
            found = run(forward, ids[past : past + 3], past, start)
            for layer, pair in enumerate(wrote):
                for side, expected in zip(forward.pool.stored(layer), pair, strict=True):
                    apart = (side.read(places) - expected).abs()  # a number between two codes may fall to either
                    step_size = float(side.tensors[1][:, places, 0].float().max())
                    assert apart.max() <= 1.1 * step_size * side.width**0.5
                    assert apart.mean() < 0.02 * step_size
            forward._native = None
            with monkeypatch.context() as patch:  # of the very same keys and values
                patch.setattr(Stored, "write", lambda *_: None)
                expected = run(forward, ids[past : past + 3], past, start)
            forward._native = step
            assert found.isfinite().all()
            torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
        forward.detach()


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.usefixtures("no_gradient")
def test_every_instruction_set_reads_the_same(isa, tmp_path, monkeypatch):
    model = load(tmp_path, head_dim=64)
    ids, found = [(7 * step) % 90 for step in range(300)], {}
    for name in ("scalar", isa):
        monkeypatch.setenv("BITSTRATA_KERNEL", f"{name}-exact")
        model = bitstrata.load(tmp_path / "out", dtype=torch.float32)
        for kind in KINDS:
            forward = attached(model, kind)
            assert forward._native is not None, forward.reason
            start = forward.pool.reserve(512).start
            for first in range(0, 288, 16):
                run(forward, ids[first : first + 16], first, start)
            codes = forward.pool.stored(0)[0].tensors[0][:, start : start + 288]
            found.setdefault(kind, []).append((run(forward, ids[288:290], 288, start), codes))
            forward.detach()
    for (logits, codes), (expected, first) in found.values():
        torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.02)
        assert (codes != first).float().mean() < 1e-3


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.usefixtures("no_gradient")
def test_threads_and_neighbours_change_nothing(threads, tmp_path):
    model = load(tmp_path, head_dim=64)
    state, before = bits_state(model), torch.get_num_threads()
    for kind in KINDS:
        forward = attached(model, kind)
        places = [forward.pool.reserve(size).start for size in (320, 16, 16)]
        ids = [[(3 * step) % 90 for step in range(300)], [5, 6, 7], [9]]
        run(forward, ids[0], 0, places[0])
        spans = [Span(places[0], 300, 2), Span(places[1], 0, 3), Span(places[2], 0, 1)]
        step = [[5, 6], *ids[1:]]
        bits = [state.resolve(one) for one in (4, 2, 4)]
        try:
            torch.set_num_threads(threads)
            together = forward.run(step, spans, bits)
            held = [tensor.clone() for tensor in forward.pool.layer(1)]
            torch.set_num_threads(1)
            for row, expected in enumerate(together):
                assert torch.equal(forward.run([step[row]], [spans[row]], [bits[row]])[0], expected)
        finally:
            torch.set_num_threads(before)
        for one, other in zip(held, forward.pool.layer(1), strict=True):
            assert torch.equal(one.nan_to_num(7), other.nan_to_num(7)), "written again as before"
        forward.detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, None), (None, 3.0)])
def test_attention_is_that_over_what_the_codes_stand_for(kind, gather, window, softcap):
    """Against float64, with heads that share keys, and three texts of which each sees its own."""
    generator, pool = torch.Generator().manual_seed(3), TokenPool(1024, kind)
    texts = [(pool.reserve(size).start, past) for size, past in ((640, 600), (32, 16), (16, 0))]
    written, module = [], torch.nn.Module()
    module.layer_idx = 0
    for start, past in texts:
        key, value = (torch.randn(1, 2, past + 1, 24, generator=generator) for _ in range(2))
        written.append((key, value))
        pool.write(0, torch.arange(start, start + past + 1), key[0], value[0])
    query = torch.randn(1, 6, 3, 24, generator=generator)
    spans = [Span(start, past, 1) for start, past in texts]
    places = torch.tensor([start + past for start, past in texts])
    new = [torch.cat([pair[side][:, :, -1:] for pair in written], 2) for side in (0, 1)]
    batch = FlatBatch(pool, spans, places, gather=gather)
    found, _ = attend(module, query, *new, None, sliding_window=window, softcap=softcap, bitstrata_batch=batch)
    keys, values = pool.stored(0)
    for row, (start, past) in enumerate(texts):
        first = start if window is None else max(start, start + past + 1 - window)
        seen = slice(first, start + past + 1)
        k, v = (side.read(seen).double().repeat_interleave(3, 0) for side in (keys, values))
        scores = (query[0, :, row].double()[:, None] @ k.transpose(1, 2))[:, 0] / 24**0.5
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        expected = (scores.softmax(-1)[:, None] @ v)[:, 0]
        torch.testing.assert_close(found[0, row].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_copies_grows_and_counts_codes(kind):
    pool, generator = TokenPool(64, kind), torch.Generator().manual_seed(0)
    assert pool.bytes == 0
    key, value = torch.randn(2, 20, 24, generator=generator), torch.randn(2, 20, 32, generator=generator)
    place = pool.reserve(20)
    keys, values = pool.write(0, torch.arange(20), key, value)
    one = 2 * (head_bytes(24, kind, torch.float32) + head_bytes(32, kind, torch.float32))
    assert pool.bytes == 64 * one
    expected = [side.read(slice(0, 20)) for side in (keys, values)]

    def holds(start):
        found = [side.read(slice(start, start + 20)) for side in pool.stored(0)]
        return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))

    other = pool.reserve(32)
    pool.copy(place, other, 20)
    assert holds(other.start)
    version = pool.version
    pool.enlarge(160)
    assert pool.version != version
    assert pool.bytes == 160 * one
    assert holds(other.start)
    assert holds(place.start)
    moved = pool.grow(place, 20, 64)
    assert moved.start >= other.stop
    assert holds(moved.start)


def test_a_pool_that_cannot_be_enlarged_stays_as_it_was(monkeypatch):
    pool = TokenPool(32, "int8")
    for layer in range(2):
        pool.write(layer, torch.arange(32), torch.ones(1, 32, 64), torch.ones(1, 32, 64))
    free = iter([10**9, 0])
    monkeypatch.setattr(memory, "free_memory", lambda: next(free))
    with pytest.raises(ResourceError, match="no memory for keys and values of 64 tokens"):
        pool.enlarge(64)
    assert pool.tokens == 32
    for layer in range(2):
        for side in pool.stored(layer):
            assert torch.allclose(side.read(slice(0, 32)), torch.ones(1, 32, 64), atol=1e-3)


@pytest.mark.usefixtures("exact_kernel")
@pytest.mark.parametrize("kind", KINDS)
def test_every_verb_makes_the_same_tokens(kind, model, tokenizer, code):
    """And a prompt whose beginning is still there is not computed again."""
    prompt = tokenizer.decode(code[:40])
    whole = bitstrata.generate(model, prompt, 4, 12, tokenizer=tokenizer, kv_cache_dtype=kind)
    again = bitstrata.generate(model, prompt, 4, 12, tokenizer=tokenizer, kv_cache_dtype=kind)
    assert again.text == whole.text
    assert again.reused_tokens > 0
    with session_of(model, kind) as own:
        assert own._pool.kv_cache_dtype == kind
    with session_of(model) as own:
        assert own._pool.kv_cache_dtype == "auto"
    ids = tokenizer(prompt).input_ids
    with Engine(model, tokenizer, kv_cache_dtype=kind, cache_tokens=256) as engine:
        handles = [engine.submit(Request(ids[at:] if at else ids, bits=4, max_new_tokens=12)) for at in (0, 3, 9)]
        results = [handle.result() for handle in handles]
        stats = engine.stats()
    assert tokenizer.decode(results[0], skip_special_tokens=True) == whole.text
    config = model.config
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads
    assert stats.cache_bytes == 256 * heads * head_bytes(config.head_dim, kind, torch.float32)
    talk = Conversation(model, tokenizer, bits=4, max_new_tokens=12, kv_cache_dtype=kind)
    assert talk.reply(prompt).text == whole.text


def test_bad_values_are_refused_with_the_list(model, tokenizer):
    calls = [
        lambda: bitstrata.generate(model, "x", kv_cache_dtype="fp8", tokenizer=tokenizer),
        lambda: Engine(model, kv_cache_dtype="fp8"),
        lambda: Conversation(model, tokenizer, kv_cache_dtype="fp8"),
        lambda: TokenPool(32, "fp8"),
        lambda: bitstrata.load("nowhere", fit=True, kv_cache_dtype="fp8"),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="kv_cache_dtype='fp8' cannot be used") as caught:
            call()
        assert "auto, int8, int4" in str(caught.value.hint)
    with pytest.raises(UsageError, match="fit"):
        bitstrata.load("nowhere", kv_cache_dtype="int8")


def test_where_it_cannot_be_it_is_an_error(model, tokenizer, monkeypatch):
    def refuse(_):
        raise BatchError("attention that is something else")

    with monkeypatch.context() as patch:
        patch.setattr(Forward, "check", refuse)
        with pytest.raises(BatchError, match="cannot be kept in int8"):
            bitstrata.generate(model, "x", tokenizer=tokenizer, kv_cache_dtype="int8", max_new_tokens=2)
        with pytest.raises(BatchError, match="cannot be kept in int8"):
            Engine(model, kv_cache_dtype="int8")
    with session_of(model, "int8") as own:
        monkeypatch.setattr(own, "longest", 3)
    with pytest.raises(UsageError, match="keeps no cache in int8"):
        bitstrata.generate(model, "x = 1", tokenizer=tokenizer, kv_cache_dtype="int8", max_new_tokens=9)
