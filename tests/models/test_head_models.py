"""Models whose output head and embedding are planes: every architecture gives what the decoded weights give."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import architectures
import pytest
import torch
from helpers import with_decoded_weights
from transformers import AutoModelForCausalLM, PreTrainedModel

import bitstrata
from bitstrata.checkpoint import CheckpointReader, validate
from bitstrata.errors import CheckpointError, PreflightError, UsageError
from bitstrata.nn import BitsState, PlaneEmbedding, PlaneLinear, TiedHead, bits_state
from bitstrata.nn.stored import PlaneModule
from bitstrata.planes import decode

NAMES = list(architectures.CONFIGS)
TIED = {"llama-tied", "qwen2-tied", "gemma2", "gemma3", "opt", "gpt2"}
HEAD_BITS = 6


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory):
    """name -> (original model, folder quantized at bits 2, 3, 8 with the head at HEAD_BITS), built on demand."""
    made: dict[str, tuple[PreTrainedModel, Path]] = {}

    def get(name: str) -> tuple[PreTrainedModel, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            original = architectures.save(name, folder / "source")
            bitstrata.quantize(
                folder / "source", folder / "out", bits="2,3,8", method="rtn", group_size=32,
                head_bits=HEAD_BITS,
            )  # fmt: skip
            made[name] = original, folder / "out"
        return made[name]

    return get


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(seed))


def dense_twin(original: PreTrainedModel, model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """A copy of the original that holds the decoded weights."""
    dense = with_decoded_weights(original, model, bits)
    for name, layer in model.named_modules():
        if isinstance(layer, PlaneModule) and not isinstance(layer, PlaneLinear):
            dense.get_submodule(name).weight.data = decode(layer.plane_weight(), HEAD_BITS)
    return dense


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_the_decoded_weights_at_any_bits(name, quantized):
    original, out = quantized(name)
    assert validate(out) == []
    model = bitstrata.load(out, device="cpu")
    ids = tokens()
    with torch.no_grad():
        expected = {bits: dense_twin(original, model, bits)(ids).logits for bits in (2, 8)}
        for bits, logits in expected.items():
            torch.testing.assert_close(model(ids, bits=bits).logits, logits, rtol=1e-4, atol=1e-4)
        mixed = model(ids, bits=torch.tensor([2, 8])).logits
        for row, bits in enumerate((2, 8)):
            torch.testing.assert_close(mixed[row], expected[bits][row], rtol=1e-4, atol=1e-4)
        # the median: where a router nearly ties, a token gets another expert at any bits
        gap = (model(ids, bits=8).logits - original(ids).logits).abs().median()
        assert gap < 0.3 * (model(ids, bits=2).logits - original(ids).logits).abs().median()


@pytest.mark.parametrize("name", NAMES)
def test_it_is_planes_in_one_copy_that_the_accessors_find(name, quantized):
    model = bitstrata.load(quantized(name)[1], device="cpu")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, PlaneEmbedding)
    if name in TIED:
        assert isinstance(head, TiedHead)
        assert head.embedding is embedding
        assert not list(head.buffers())
    else:
        assert isinstance(head, PlaneLinear)
        assert head.bits == (HEAD_BITS,)
    assert embedding.bits == (HEAD_BITS,)
    assert not any(value.shape[0] == 96 and value.dim() == 2 for value in model.parameters())
    assert isinstance(bits_state(model), BitsState)
    assert bits_state(model).supported == (2, 3, 8)
    assert not any(
        layer.endswith(("lm_head", "embed_out", "wte", "embed_tokens")) for layer in bits_state(model).layers
    )
    before = model.state_dict()
    model.tie_weights()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert model.get_output_embeddings() is head


@pytest.mark.parametrize("name", NAMES)
def test_save_pretrained_round_trips_and_low_bits_need_no_high_planes(name, quantized, tmp_path):
    out = quantized(name)[1]
    ours, theirs = bitstrata.load(out, device="cpu"), AutoModelForCausalLM.from_pretrained(out)
    theirs.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    few = tmp_path / "few"
    few.mkdir()
    for path in out.iterdir():
        if path.name not in {f"model-plane-{plane}.safetensors" for plane in range(2, 8)} | {
            "model-bits-3.safetensors", "model-bits-8.safetensors",
        }:  # fmt: skip
            (few / path.name).write_bytes(path.read_bytes())
    lowest = bitstrata.load(few, max_bits=2, device="cpu")
    reloaded = bitstrata.load(tmp_path / "again", max_bits=3, device="cpu")
    ids = tokens()
    with torch.no_grad():
        for bits in (2, 3):
            expected = ours(ids, bits=bits).logits
            assert torch.equal(theirs(ids, bits=bits).logits, expected)
            assert torch.equal(again(ids, bits=bits).logits, expected)
            assert torch.equal(reloaded(ids, bits=bits).logits, expected)
        assert torch.equal(lowest(ids).logits, ours(ids, bits=2).logits)


@pytest.mark.parametrize("name", ["llama-tied", "llama", "gemma3"])
def test_copies_pickles_and_moves_keep_the_tie(name, quantized):
    model = bitstrata.load(quantized(name)[1], device="cpu")
    ids = tokens()
    with torch.no_grad():
        expected = model(ids, bits=3).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(ids, bits=3).logits, expected)
            if name != "llama":
                assert twin.lm_head.embedding is twin.model.embed_tokens
                assert twin.model.embed_tokens is not model.model.embed_tokens
        assert torch.equal(model.to("cpu")(ids, bits=3).logits, expected)
        half = copy.deepcopy(model).to(torch.bfloat16)
        assert half.get_input_embeddings()(ids).dtype == torch.bfloat16
        assert (half(ids, bits=8).logits.float() - model(ids, bits=8).logits).abs().max() < 0.5


def test_a_tied_model_holds_the_planes_once(quantized):
    model = bitstrata.load(quantized("llama-tied")[1], device="cpu")
    embedding = model.model.embed_tokens
    assert embedding.packed.layout != "stored"
    owners = [
        name for name, value in model.named_buffers() if value.numel() and ("embed_tokens" in name or "lm_head" in name)
    ]
    assert owners
    assert all(name.startswith("model.embed_tokens.packed_") for name in owners)
    stored = CheckpointReader(quantized("llama-tied")[1]).spec
    assert "lm_head" not in stored.layers
    assert stored.layers["model.embed_tokens"].tied == "lm_head"


@pytest.mark.parametrize("name", ["gemma3", "gemma2"])
def test_scaled_embeddings_keep_their_scale(name, quantized):
    original, out = quantized(name)
    model = bitstrata.load(out, device="cpu")
    ids = tokens()
    table = decode(model.get_input_embeddings().plane_weight(), HEAD_BITS)
    for dtype in (torch.float32, torch.bfloat16):
        dense = copy.deepcopy(original).to(dtype).get_input_embeddings()
        dense.weight.data = table.to(dtype)
        mine = copy.deepcopy(model).to(dtype).get_input_embeddings()
        assert torch.equal(mine(ids), dense(ids))


@pytest.mark.parametrize("name", ["llama-tied", "llama", "gpt2", "gpt-neox"])
def test_generate_and_the_vocabulary_that_cannot_be_resized(name, quantized):
    model = bitstrata.load(quantized(name)[1], device="cpu")
    ids = tokens()
    made = model.generate(ids, bits=2, max_new_tokens=6, do_sample=False)
    assert not torch.equal(made, model.generate(ids, bits=8, max_new_tokens=6, do_sample=False))
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    with pytest.raises(UsageError, match="cannot be resized") as caught:
        model.resize_token_embeddings(128)
    assert "--head-bits" in str(caught.value.hint)


def test_an_unquantized_embedding_can_still_be_resized(tmp_path):
    architectures.save("llama-tied", tmp_path / "source")
    bitstrata.quantize(tmp_path / "source", tmp_path / "out", bits=2, method="rtn", group_size=32)
    model = bitstrata.load(tmp_path / "out", device="cpu")
    model.resize_token_embeddings(100)
    assert model(tokens()).logits.shape[-1] == 100


@pytest.mark.parametrize("name", ["llama-tied", "llama"])
def test_one_compiled_graph_holds_lookup_and_head(name, quantized):
    model = bitstrata.load(quantized(name)[1], device="cpu")
    ids = tokens()
    with torch.no_grad():
        expected = model(ids, bits=3, use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids, bits=3, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_embedding_that_does_more_than_look_up_is_refused_by_name_before_anything_is_written(tmp_path, monkeypatch):
    from transformers.models.gemma3 import modeling_gemma3

    class NormedEmbedding(modeling_gemma3.Gemma3TextScaledWordEmbedding):
        pass

    architectures.save("gemma3", tmp_path / "source")
    monkeypatch.setattr(modeling_gemma3, "Gemma3TextScaledWordEmbedding", NormedEmbedding)
    with pytest.raises(PreflightError, match=r"model\.embed_tokens of Gemma3ForCausalLM cannot be quantized") as caught:
        bitstrata.quantize(tmp_path / "source", tmp_path / "out", bits=2, method="rtn", group_size=32, head_bits=6)
    assert "NormedEmbedding does more than look rows up" in str(caught.value)
    assert "leave --head-bits out" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_and_a_config_that_tie_differently_are_refused(quantized, tmp_path):
    for name, tie, said in (("llama-tied", False, "ties it to lm_head"), ("llama", True, "ties")):
        folder = tmp_path / name
        folder.mkdir()
        for path in quantized(name)[1].iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        text = (folder / "config.json").read_text()
        changed = text.replace(
            f'"tie_word_embeddings": {str(not tie).lower()}', f'"tie_word_embeddings": {str(tie).lower()}'
        )
        assert changed != text
        (folder / "config.json").write_text(changed)
        with pytest.raises(CheckpointError, match=said):
            bitstrata.load(folder, device="cpu")
