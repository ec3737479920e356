"""Every architecture: discovered, quantized, loaded, saved; outputs are those of the decoded weights."""

from __future__ import annotations

import architectures
import pytest
import tiny_models
import torch
from helpers import with_decoded_weights
from transformers import AutoConfig, AutoModelForCausalLM

import bitstrata
from bitstrata.errors import PreflightError
from bitstrata.models import SourceModel, discover
from bitstrata.nn import PlaneLinear

NAMES = list(architectures.CONFIGS)
LINEARS_PER_BLOCK = {
    "phi3": 4, "opt": 6, "gpt-neox": 4, "gpt2": 4, "mixtral": 4 + 12, "olmoe": 4 + 12, "qwen3-moe": 4 + 15,
}  # fmt: skip


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_discovery_finds_every_linear_of_the_blocks_and_names_the_rest(name, quantized):
    model = SourceModel(quantized(name)[1]).skeleton()
    found = discover(model)
    assert len(found.blocks) == 2
    assert len(found.linears) == 2 * LINEARS_PER_BLOCK.get(name, 7)
    named = {f"{linear.name}.weight" for linear in found.linears} | {entry.name for entry in found.left_out}
    matrices = {key for key, value in model.state_dict().items() if value.dim() >= 2}
    tied_copies = {key for group in found.tied for key in group[1:]}
    assert matrices - tied_copies <= named
    assert all(entry.reason for entry in found.left_out)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_those_of_the_decoded_weights(name, quantized):
    original, _, out = quantized(name)
    model = bitstrata.load(out)
    ids = tokens()
    with torch.no_grad():
        for bits in (2, 8):
            expected = with_decoded_weights(original, model, bits)(ids).logits
            torch.testing.assert_close(model(ids, bits=bits).logits, expected, rtol=1e-4, atol=1e-4)
        gap = (model(ids, bits=8).logits - original(ids).logits).abs().mean()  # a token may change its expert
        assert gap < 0.1 * (model(ids, bits=2).logits - original(ids).logits).abs().mean()


@pytest.mark.parametrize("name", NAMES)
def test_from_pretrained_equals_load_and_save_pretrained_round_trips(name, quantized, tmp_path):
    out = quantized(name)[2]
    ours = bitstrata.load(out)
    theirs = AutoModelForCausalLM.from_pretrained(out)
    ids = tokens()
    theirs.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype, key
        assert torch.equal(value, after[key]), key
    reloaded = bitstrata.load(tmp_path / "again", max_bits=3)
    with torch.no_grad():
        for bits in (2, 3):
            expected = ours(ids, bits=bits).logits
            assert torch.equal(theirs(ids, bits=bits).logits, expected)
            assert torch.equal(reloaded(ids, bits=bits).logits, expected)


@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "gpt2", "opt"])
def test_generate_takes_bits(name, quantized):
    model = bitstrata.load(quantized(name)[2])
    ids = tokens()
    settings = {"max_new_tokens": 8, "do_sample": False, "use_cache": True}
    at_two = model.generate(ids, bits=2, **settings)
    with bitstrata.use_bits(model, 2):
        assert torch.equal(model.generate(ids, **settings), at_two)
    assert not torch.equal(model.generate(ids, bits=8, **settings), at_two)


def test_skip_patterns_leave_layers_alone_and_report_them(quantized, tmp_path):
    _, source, _ = quantized("llama")
    skip = ("*.down_proj", r"re:.*layers\.0\.self_attn\..*")
    report = bitstrata.quantize(source, tmp_path / "out", bits=2, method="rtn", group_size=32, skip=skip)
    model = bitstrata.load(tmp_path / "out")
    kept = [name for name, module in model.named_modules() if isinstance(module, PlaneLinear)]
    assert len(kept) == 14 - 2 - 4
    assert sum("skipped by --skip" in entry["reason"] for entry in report.left_out) == 6
    assert model.model.layers[0].mlp.down_proj.weight.shape == (48, 72)


@pytest.mark.parametrize("name", NAMES)
def test_sequences_of_one_batch_may_differ_in_bits(name, quantized):
    model = bitstrata.load(quantized(name)[2])
    ids = tokens()
    with torch.no_grad():
        mixed = model(ids, bits=torch.tensor([2, 8], dtype=torch.int8)).logits
        for row, bits in enumerate((2, 8)):
            torch.testing.assert_close(mixed[row], model(ids, bits=bits).logits[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 3}], ids=str)
def test_per_sequence_bits_survive_beams_and_several_returns(quantized, settings):
    """Each sequence, however often it is repeated, gets the tokens that it gets alone at its bits."""
    model = bitstrata.load(quantized("opt")[2])
    ids, bits = tokens(), torch.tensor([2, 8])
    settings = {"max_new_tokens": 4, "do_sample": False, **settings}
    together = model.generate(ids, bits=bits, **settings)
    alone = [model.generate(ids[row : row + 1], bits=int(bits[row]), **settings) for row in range(2)]
    assert not torch.equal(*alone)
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("model_type", ["bloom", "gptj"])
def test_blocks_that_return_tuples_run_with_calibration(model_type, tmp_path):
    settings = {"hidden_size": 48, "n_embd": 48, "n_layer": 2, "n_head": 4, "num_hidden_layers": 2, "rotary_dim": 8}
    config = AutoConfig.for_model(model_type, vocab_size=64, n_positions=64, initializer_range=0.1, **settings)
    tiny_models.save(AutoModelForCausalLM.from_config(config), tmp_path / "source")
    tiny_models.tiny_text(tmp_path / "text.txt")
    report = bitstrata.quantize(
        tmp_path / "source", tmp_path / "out", bits="3,8", group_size=16, calibration=tmp_path / "text.txt",
        num_samples=4, seq_len=32, options={"iterations": 2, "tune_steps": 2},
    )  # fmt: skip
    ids = torch.randint(3, 64, (2, 16))
    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(tmp_path / "source")(ids).logits
        assert report.results[1]["kld"] < report.results[0]["kld"]
        assert (bitstrata.load(tmp_path / "out")(ids).logits - original).abs().max() < 0.2


def test_experts_merged_in_a_way_that_is_not_known_are_refused(tmp_path):
    config = AutoConfig.for_model(
        "jetmoe", hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, kv_channels=12,
        intermediate_size=72, vocab_size=96, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    with pytest.raises(PreflightError, match="mixture of experts"):
        bitstrata.quantize(tmp_path / "source", tmp_path / "out", bits=2, method="rtn")
