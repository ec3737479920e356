"""A decoding step in one native call computes what the model's modules compute, for every kind of block it knows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import bitstrata
from bitstrata.kernels.cpu.extension import native
from bitstrata.nn import bits_state
from bitstrata.runtime.batching.attention import Span
from bitstrata.runtime.batching.forward import Forward
from bitstrata.runtime.batching.memory import TokenPool

pytestmark = pytest.mark.skipif(native is None, reason="the native kernels are not built")

SHARED = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 90,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_theta": 10000.0}
KNOWN = {
    "llama": ("llama", {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama3-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
                **ROPE,
            }
        },
    ),
    "yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **ROPE}}),
    "mistral": ("mistral", {"sliding_window": 20, "head_dim": 24}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 20}),
    "gemma2": ("gemma2", {"head_dim": 12, "sliding_window": 20, "query_pre_attn_scalar": 7}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 12, "sliding_window": 20, "query_pre_attn_scalar": 7, "num_hidden_layers": 7},
    ),
    "phi3": ("phi3", {"original_max_position_embeddings": 1024}),
    "phi3-partial": ("phi3", {"original_max_position_embeddings": 1024, "partial_rotary_factor": 0.5, "head_dim": 16}),
}


def load(folder, kind, settings, **options):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHARED, **settings})).float().eval()
    for name, parameter in model.named_parameters():  # norms and biases of any size, logits that depend on every layer
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "gemma" not in kind), std=0.2)
    model.save_pretrained(folder / "source")
    bitstrata.quantize(folder / "source", folder / "out", bits="2-4,6", method="rtn", group_size=32, **options)
    return bitstrata.load(folder / "out", dtype=torch.float32)


class Running:
    """A model attached, its cache poisoned, and two ways through it."""

    def __init__(self, model, tokens=2048):
        self.model, self.pool = model, TokenPool(tokens)
        self.forward = Forward(model, self.pool)
        self.forward.check()
        self.step = self.forward._step
        for layer in range(model.config.get_text_config().num_hidden_layers):
            for held in self.pool.layer(layer):
                held.fill_(torch.nan)

    def both(self, tokens, spans, bits):
        """Logits of the native step, of the modules, and the difference of what they left in the cache."""
        state = bits_state(self.model)
        assignments = [state.resolve(one) for one in bits]
        found, caches = [], []
        for step in (self.step, None):
            self.forward._step = step
            found.append(self.forward.run(tokens, spans, assignments))
            caches.append([held.clone() for layer in (0, 1) for held in self.pool.layer(layer)])
        self.forward._step = self.step
        for one, other in zip(*caches, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)
        return found


@pytest.fixture
def no_gradient():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.usefixtures("no_gradient", "exact_kernel")
def test_logits_and_cache_are_those_of_the_modules(name, tmp_path):
    running = Running(load(tmp_path, *KNOWN[name]))
    assert running.step is not None, running.forward.reason
    first, second, third = (running.pool.reserve(size) for size in (16, 640, 64))
    ids = [(7 * step) % 90 for step in range(700)]
    long = 600  # in three pieces of attention, beyond every window
    running.both([ids[:long]], [Span(second.start, 0, long)], [3])
    for past in range(2):
        native_, modules = running.both(
            [[5], ids[long + past : long + past + 1], ids[past * 7 : past * 7 + 7]],
            [Span(first.start, past, 1), Span(second.start, long + past, 1), Span(third.start, past * 7, 7)],
            [2, 6, 4],
        )
        torch.testing.assert_close(native_, modules, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("no_gradient", "exact_kernel")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(tmp_path, threads):
    running = Running(load(tmp_path, "llama", {"num_attention_heads": 12, "head_dim": 8}))
    place = running.pool.reserve(600)
    state = bits_state(running.model)
    running.both([[(3 * step) % 90 for step in range(590)]], [Span(place.start, 0, 590)], [4])
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            found.append(running.forward.run([[5, 6]], [Span(place.start, 590, 2)], [state.resolve(3)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.usefixtures("no_gradient")
def test_a_row_is_what_it_is_alone(tmp_path):
    """In int8 as well, where the last bit of an activation decides: nobody notices with whom a batch is shared."""
    running = Running(load(tmp_path, *KNOWN["qwen3"], head_bits=6))
    assert running.step is not None, running.forward.reason
    state = bits_state(running.model)
    bits = [state.resolve(one) for one in (2, 3, 4, 6, 3, 3, 2)]
    ids = [[(11 * row + step) % 90 for step in range(1 + row % 3)] for row in range(len(bits))]
    places = [running.pool.reserve(16) for _ in bits]
    spans = [Span(place.start, 0, len(part)) for place, part in zip(places, ids, strict=True)]
    together = running.forward.run(ids, spans, bits)
    for row, logits in enumerate(together):
        assert torch.equal(running.forward.run([ids[row]], [spans[row]], [bits[row]])[0], logits)


@pytest.mark.usefixtures("no_gradient", "exact_kernel")
def test_what_it_does_not_know_takes_the_modules(tmp_path):
    model = load(tmp_path, *KNOWN["llama"])
    block = model.model.layers[1]

    def reason():
        running = Running(model)
        running.forward.detach()
        assert running.step is None
        return running.forward.reason

    hook = block.mlp.register_forward_hook(lambda *_: None)
    assert "hooks" in reason()
    hook.remove()
    block.self_attn.extra = nn.Linear(2, 2)
    assert "has a part extra" in reason()
    del block.self_attn.extra
    norm, block.input_layernorm = block.input_layernorm, nn.LayerNorm(48)
    assert "not an RMS norm" in reason()
    block.input_layernorm = norm
    act, block.mlp.act_fn = block.mlp.act_fn, nn.Tanh()
    assert "Tanh" in reason()
    block.mlp.act_fn = act
    rotary = model.model.rotary_emb
    plain = type(rotary).forward

    def needs_hidden_states(self, x, position_ids):
        assert x.dim() == 3, "hidden states"
        return plain(self, x, position_ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(rotary), "forward", needs_hidden_states)
        assert "looking at its parts ends with AssertionError" in reason()
    forward = block.mlp.forward
    block.mlp.forward = lambda x: 1.1 * forward(x)  # what no look at the parts shows
    assert "differ from those of the modules" in reason()


@pytest.mark.usefixtures("no_gradient", "exact_kernel")
def test_a_resized_model_runs_its_new_pages(tmp_path):
    load(tmp_path, *KNOWN["llama"])
    model = bitstrata.load(tmp_path / "out", plan=dict.fromkeys(bits_state(load_again(tmp_path)).layers, 3))
    running = Running(model)
    place = running.pool.reserve(16)
    before, modules = running.both([[5, 6]], [Span(place.start, 0, 2)], [None])
    torch.testing.assert_close(before, modules, rtol=1e-4, atol=1e-4)
    model.resize(dict.fromkeys(bits_state(model).layers, 2))
    assert not running.step.is_current
    after = running.forward.run([[5, 6]], [Span(place.start, 0, 2)], [bits_state(model).resolve(None)])
    running.step = None
    running.forward._step = None
    modules = running.forward.run([[5, 6]], [Span(place.start, 0, 2)], [bits_state(model).resolve(None)])
    torch.testing.assert_close(after, modules, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, atol=1e-2)


def load_again(folder):
    return bitstrata.load(folder / "out", dtype=torch.float32)


@pytest.mark.usefixtures("no_gradient", "exact_kernel")
def test_numbers_that_do_not_fit_are_errors(tmp_path):
    running = Running(load(tmp_path, *KNOWN["llama"]))
    step, angles = running.step._step, running.step._angles[0].at([0])
    x, logits = torch.zeros(1, 48), torch.empty(1, 90)
    table = torch.full((20, 1), 4, dtype=torch.int8)
    good = {
        "x": x.data_ptr(),
        "start": [0],
        "position": [0],
        "bits": table.data_ptr(),
        "cosine": [angles[0].data_ptr()],
        "sine": [angles[1].data_ptr()],
        "first_block": 0,
        "last_block": 2,
        "wanted": [0],
        "logits": logits.data_ptr(),
        "threads": 1,
        "exact": True,
    }

    def run(**other):
        step.run(*{**good, **other}.values())

    run()
    assert logits.isfinite().all()
    for wrong in (
        {"start": [2048]},
        {"position": [-1]},
        {"start": [0] * 17, "position": [0] * 17},
        {"wanted": [1]},
        {"last_block": 3},
        {"cosine": [], "sine": []},
    ):
        with pytest.raises((ValueError, IndexError)):
            run(**wrong)
    table.fill_(5)
    with pytest.raises(ValueError, match="no scales"):
        run()
