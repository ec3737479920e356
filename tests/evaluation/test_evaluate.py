"""`bitstrata.evaluate` against the same measures computed directly, in float64, a window at a time."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from job_helpers import RTN, run
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama, tiny_text, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import bitstrata
from bitstrata.calibration import evaluation_windows, read_text
from bitstrata.checkpoint import CheckpointReader
from bitstrata.errors import InputError, ModelError, TextError, UnsupportedBitsError, UsageError
from bitstrata.evaluation import evaluate, perplexity
from bitstrata.kernels import registry
from bitstrata.planes import decode
from bitstrata.plans import Plan


def dense_model(model: Path, quantized: Path, bits: int | None) -> PreTrainedModel:
    """The original in float64, its linears replaced by the decoded weights at `bits`."""
    original: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    if bits is not None:
        reader = CheckpointReader(quantized)
        for layer in reader.spec.layers:
            weight = decode(reader.layer(layer), bits, torch.float64)
            original.get_submodule(layer).weight = torch.nn.Parameter(weight, requires_grad=False)
    return original


@torch.no_grad()
def direct(model: PreTrainedModel, windows: list[list[int]], given: int = 1) -> tuple[Tensor, Tensor]:
    """Log-probabilities float64 [tokens, vocab] and targets [tokens], all but the first `given` of each window."""
    parts = [model(torch.tensor([window])).logits[0, given - 1 : -1].log_softmax(-1) for window in windows]
    return torch.cat(parts), torch.tensor([token for window in windows for token in window[given:]])


@pytest.mark.parametrize("seq_len", [9, 64])
def test_measures_are_those_of_the_decoded_model(model: Path, quantized: Path, text: Path, seq_len: int) -> None:
    found = evaluate(quantized, text, reference=model, seq_len=seq_len, device="cpu")
    windows = list(evaluation_windows(tiny_tokenizer(), read_text(text), seq_len))
    log_p, targets = direct(dense_model(model, quantized, None), windows)
    every = torch.arange(len(targets))
    count = sum(layer.in_features * layer.out_features for layer in CheckpointReader(quantized).spec.layers.values())
    assert found.tokens == len(targets)
    assert found.reference is not None
    assert found.reference["nll"] == pytest.approx(float(-log_p[every, targets].mean()), rel=1e-5)
    assert [row.bits for row in found.results] == [2, 3, 4]
    for row in found.results:
        log_q, _ = direct(dense_model(model, quantized, int(row.bits)), windows)
        assert row.nll == pytest.approx(float(-log_q[every, targets].mean()), rel=1e-5)
        assert row.perplexity == pytest.approx(float((-log_q[every, targets].mean()).exp()), rel=1e-4)
        assert row.kld == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(1).mean()), rel=1e-4)
        agreement = float((log_p.argmax(1) == log_q.argmax(1)).double().mean())
        assert row.top1_agreement == pytest.approx(agreement, abs=2 / len(targets))  # a tie may fall either way
        assert row.bpw_read == row.bits + 16 / 32 * (row.bits + 1)
        assert row.bytes * 8 == row.bpw_read * count


@pytest.mark.parametrize("prefix", ["", "<s>", "<unk> <s>"])
def test_second_halves_are_those_of_whole_windows_of_the_joined_text(
    model: Path, quantized: Path, text: Path, prefix: str
) -> None:
    """Windows as llama-perplexity cuts them: BOS takes the place of a window's first token, a rest is left out."""
    tokenizer, loaded = tiny_tokenizer(prefix), bitstrata.load(quantized, device="cpu", dtype=torch.float32)
    front = tokenizer("").input_ids
    stream = [token for document in read_text(text) for token in tokenizer(document).input_ids]
    windows = [[*front, *stream[start : start + 20][len(front) :]] for start in range(0, len(stream) - 19, 20)]
    assert all(len(window) == 20 for window in windows)
    log_p, targets = direct(dense_model(model, quantized, None), windows, 11)
    log_q, _ = direct(dense_model(model, quantized, 3), windows, 11)
    assert len(targets) == 9 * len(windows)
    found = evaluate(loaded, text, 3, model, 20, scored="second-half", tokenizer=tokenizer)
    (row,) = found.results
    every = torch.arange(len(targets))
    assert (found.tokens, found.seq_len, found.scored) == (len(targets), 20, "second-half")
    assert row.nll == pytest.approx(float(-log_q[every, targets].mean()), rel=1e-5)
    assert row.kld == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(1).mean()), rel=1e-4)
    short = evaluate(loaded, text, 3, seq_len=20, scored="second-half", tokenizer=tokenizer, max_tokens=13)
    assert short.tokens == 13
    assert "second halves of windows of 20" in str(short)


def test_windows_of_second_halves_are_512_long_unless_said_otherwise(quantized: Path, text: Path) -> None:
    found = evaluate(quantized, text, bits=3, scored="second-half", device="cpu")
    assert found.seq_len == 64
    assert found.notes == (), "the model's context is shorter than 512, which nobody asked for"
    with pytest.raises(UsageError, match="scored 'last' is not known"):
        evaluate(quantized, text, scored="last", device="cpu")
    with pytest.raises(UsageError, match="seq_len must be at least 3, got 2"):
        evaluate(quantized, text, scored="second-half", seq_len=2, device="cpu")


def test_without_anything_to_measure_and_without_the_harness_a_sentence_says_so(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="nothing to measure"):
        evaluate(quantized)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match="tasks need lm-evaluation-harness") as caught:
        evaluate("nowhere", tasks="hellaswag")  # said before a model is looked for
    assert "bitstrata[eval]" in (caught.value.hint or "")


def test_a_text_shorter_than_a_window_has_no_second_half(quantized: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x" * 30)
    with pytest.raises(TextError, match="no window of 64 tokens"):
        evaluate(quantized, tmp_path / "text", scored="second-half", device="cpu")


@pytest.mark.parametrize(("prefix", "given"), [("", 1), ("<s>", 1), ("<unk> <s>", 2)])
def test_the_text_is_predicted_behind_what_its_tokenizer_puts_in_front(
    model: Path, quantized: Path, tmp_path: Path, prefix: str, given: int, seed: int
) -> None:
    """BOS is read where the tokenizer adds it, not where it is only defined; no token of a prefix is predicted."""
    tokenizer, loaded = tiny_tokenizer(prefix), bitstrata.load(quantized, device="cpu", dtype=torch.float32)
    lines = tiny_text(tmp_path / "text", seed=seed, documents=3, words=8)
    windows = [tokenizer(document).input_ids for document in read_text(lines)]
    assert all(len(window) <= 64 for window in windows)
    log_q, targets = direct(dense_model(model, quantized, 3), windows, given)
    found = evaluate(loaded, lines, bits=3, tokenizer=tokenizer)
    assert found.tokens == len(targets) == sum(len(window) - given for window in windows)
    assert found.results[0].nll == pytest.approx(float(-log_q[torch.arange(len(targets)), targets].mean()), rel=1e-5)


def test_a_token_beyond_the_vocabulary_is_named(quantized: Path, tmp_path: Path) -> None:
    loaded, tokenizer = bitstrata.load(quantized, device="cpu"), tiny_tokenizer()
    tokenizer.add_tokens(["qu"])
    (tmp_path / "text").write_text("a question")
    with pytest.raises(InputError, match=r"token 64 \('qu'\), the model knows 64 tokens") as caught:
        evaluate(loaded, tmp_path / "text", tokenizer=tokenizer)
    assert "tokenizer" in (caught.value.hint or "")


def test_padding_changes_nothing(model: Path, quantized: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 2 to 64 tokens together in a batch, and each alone."""
    monkeypatch.setenv(registry.ENVIRONMENT, "reference")  # others make activations of few rows int8
    together = evaluate(quantized, text, reference=model, device="cpu")
    monkeypatch.setattr(perplexity, "TOKENS_PER_BATCH", 1)
    alone = evaluate(quantized, text, reference=model, device="cpu")
    assert together.tokens == alone.tokens
    for one, other in zip(together.results, alone.results, strict=True):
        assert one.nll == pytest.approx(other.nll, rel=1e-5)
        assert one.kld == pytest.approx(other.kld, rel=1e-4)
        assert one.top1_agreement == pytest.approx(other.top1_agreement, abs=2 / alone.tokens)


def test_batches_hold_every_window_once_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "TOKENS_PER_BATCH", 20)
    windows = [[index] * (1 + index % 13) for index in range(40)]
    batches = list(perplexity.batches(iter(windows), len))
    assert sorted(window for batch in batches for window in batch) == sorted(windows)
    assert all(max(map(len, batch)) * len(batch) <= 20 for batch in batches)


def test_a_model_measured_against_itself_is_at_no_distance(quantized: Path, text: Path) -> None:
    loaded = bitstrata.load(quantized, device="cpu")  # runs at 4 bits unless told otherwise
    found = evaluate(loaded, text, reference=loaded, device="cpu")
    assert [row.kld == 0 for row in found.results] == [False, False, True]
    assert found.results[-1].top1_agreement == 1
    assert found.reference is not None
    assert found.reference["nll"] == found.results[-1].nll


def test_what_is_asked_for_is_measured(quantized: Path, text: Path) -> None:
    found = evaluate(quantized, text, bits=3, max_tokens=50, device="cpu")
    assert found.tokens == 50
    assert found.reference is None
    (row,) = found.results
    assert (row.bits, row.kld, row.top1_agreement) == (3, None, None)
    assert [row.bits for row in evaluate(quantized, text, bits=[4, 2], max_tokens=5, device="cpu").results] == [4, 2]


def test_a_loaded_model_keeps_the_bits_it_had(quantized: Path, text: Path) -> None:
    loaded = bitstrata.load(quantized, bits=2, device="cpu")
    by_model = evaluate(loaded, text, max_tokens=40, device="cpu")
    assert bitstrata.nn.bits_state(loaded).value == 2
    assert by_model.results == evaluate(quantized, text, max_tokens=40, device="cpu").results


def test_a_window_beyond_the_context_is_lowered_with_a_note(quantized: Path, text: Path) -> None:
    found = evaluate(quantized, text, seq_len=1000, max_tokens=5, device="cpu")
    assert found.seq_len == 64
    assert found.notes == ("seq-len lowered from 1000 to 64, the model's context",)
    assert evaluate(quantized, text, max_tokens=5, device="cpu").notes == (), "nobody asked for 2048"


def test_the_json_has_the_keys_of_the_contract(model: Path, quantized: Path, text: Path) -> None:
    found = json.loads(json.dumps(evaluate(quantized, text, reference=model, max_tokens=30, device="cpu").to_json()))
    assert {"model", "text", "tokens", "reference", "results"} <= found.keys()
    assert found["reference"].keys() >= {"perplexity", "nll"}
    for row in found["results"]:
        assert row.keys() >= {"bits", "perplexity", "nll", "kld", "top1_agreement", "bpw_read", "bytes"}
    assert str(found["tokens"]) in str(evaluate(quantized, text, max_tokens=30, device="cpu"))


@pytest.mark.parametrize("bits", [0, 5, [2, 9]])
def test_bits_that_the_model_lacks_are_refused(bits: int | list[int], quantized: Path, text: Path) -> None:
    with pytest.raises(UnsupportedBitsError) as caught:
        evaluate(quantized, text, bits=bits, device="cpu")
    assert caught.value.hint == "supported bits: 2, 3, 4"


def test_limits_that_make_no_sense_are_refused(quantized: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="max_tokens must be at least 1"):
        evaluate(quantized, text, max_tokens=0, device="cpu")
    with pytest.raises(UsageError, match="seq_len must be at least 2"):
        evaluate(quantized, text, seq_len=1, device="cpu")


def test_a_text_without_a_single_prediction_is_refused(model: Path, tmp_path: Path) -> None:
    """A tokenizer without BOS makes one token of the text, which predicts nothing."""
    run(model, tmp_path / "out", None, **RTN)
    tokenizer = tiny_tokenizer(prefix="")
    (tmp_path / "text").write_text("a")
    with pytest.raises(TextError, match="no window of two tokens"):
        evaluate(bitstrata.load(tmp_path / "out"), tmp_path / "text", tokenizer=tokenizer, device="cpu")


def test_a_reference_with_another_vocabulary_is_refused(quantized: Path, text: Path, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", vocab_size=80)
    loaded = AutoModelForCausalLM.from_pretrained(other)
    for reference in (other, loaded):
        with pytest.raises(ModelError, match="another vocabulary") as caught:
            evaluate(quantized, text, reference=reference, device="cpu")
        assert "80" in caught.value.message


def test_a_reference_that_is_not_whole_is_refused(model: Path, quantized: Path, text: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"stores no tensor for model\.layers\.1\.mlp\.up_proj\.weight"):
        evaluate(quantized, text, reference=broken, device="cpu")
    (broken / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ModelError, match="cannot be loaded"):
        evaluate(quantized, text, reference=broken, device="cpu")
    with pytest.raises(ModelError, match="no reference model folder"):
        evaluate(quantized, text, reference=tmp_path / "nowhere", device="cpu")


@pytest.mark.parametrize("bits", [np.int64(3), torch.tensor(3), [np.int8(3)], np.array([3]), (3,), "3"], ids=repr)
def test_whole_numbers_of_other_libraries_are_bits(bits: object, quantized: Path, text: Path) -> None:
    expected = evaluate(quantized, text, bits=3, max_tokens=40, device="cpu")
    assert evaluate(quantized, text, bits=bits, max_tokens=40, device="cpu").results == expected.results  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [3.0, True, [2.0], [True], ["2"], print, []], ids=repr)
def test_what_is_neither_bits_nor_a_plan_is_refused(bits: object, quantized: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="bits"):
        evaluate(quantized, text, bits=bits, device="cpu")  # type: ignore[arg-type]


def test_plans_as_dicts_and_equal_plans_have_a_row_each(quantized: Path, text: Path) -> None:
    layers = CheckpointReader(quantized).spec.planned_layers
    plan = {name: 2 + index % 3 for index, name in enumerate(layers)}
    found = evaluate(quantized, text, bits=[plan, Plan(plan, name="mine"), 2], max_tokens=40, device="cpu").results
    assert [row.bits for row in found] == ["plan", "mine", 2]
    assert found[0].nll == found[1].nll != found[2].nll
    resident = evaluate(bitstrata.load(quantized, plan=plan, device="cpu"), text, max_tokens=40).results
    assert [(row.nll, row.bytes) for row in resident] == [(found[0].nll, found[0].bytes)]
