"""What cannot be run block by block is refused before anything is written; memory that runs out is called that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from job_helpers import ANYBCQ, RTN, assert_report_measures_the_checkpoint, digests, run
from tiny_models import VOCABULARY, save
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import bitstrata
from bitstrata.calibration import BlockRunner
from bitstrata.checkpoint import CheckpointReader
from bitstrata.errors import ModelError, PreflightError, ResourceError
from bitstrata.planes import decode


def four_at_a_time() -> PreTrainedModel:
    """Its hidden states are [4, b, S, hidden], and its blocks are given embeddings of the tokens beside them."""
    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        vocab_size=len(VOCABULARY), vocab_size_per_layer_input=len(VOCABULARY), hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, hidden_size_per_layer_input=8,
        num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"], laurel_rank=4, altup_num_inputs=4,
        activation_sparsity_pattern=[0.0, 0.0], sliding_window=16, max_position_embeddings=64,
    )  # fmt: skip
    return Gemma3nForCausalLM(config).eval()


def blocks_that_return_lists() -> PreTrainedModel:
    torch.manual_seed(0)
    config = OpenAIGPTConfig(
        vocab_size=len(VOCABULARY), n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.15
    )
    return OpenAIGPTLMHeadModel(config).eval()


@pytest.mark.parametrize("method", [RTN, ANYBCQ], ids=lambda method: method["method"])
def test_hidden_states_of_another_form_are_refused_before_anything_is_written(
    method: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    source = save(four_at_a_time(), tmp_path / "model")
    with pytest.raises(PreflightError, match="nothing was written") as caught:
        run(source, tmp_path / "out", text, **method)
    (problem,) = caught.value.problems
    assert isinstance(problem, ModelError)
    assert "hidden states of [1, 32] tokens are [4, 1, 32, 32]" in problem.message
    assert "--preset fast" in (problem.hint or "")
    assert not (tmp_path / "out").exists()
    # and what the hint says works: the model with the weights that the planes stand for
    run(source, tmp_path / "out", None, **RTN)
    quantized = bitstrata.load(tmp_path / "out", device="cpu")
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    reader = CheckpointReader(tmp_path / "out")
    for name in reader.spec.planned_layers:
        weight = dense.get_submodule(name).weight
        weight.data = decode(reader.layer(name), 3)
    ids = torch.randint(3, 64, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(quantized(ids, bits=3).logits, dense(ids).logits, rtol=1e-2, atol=1e-2)


def test_blocks_that_return_lists_are_calibrated_and_measured_right(text: Path, tmp_path: Path) -> None:
    source = save(blocks_that_return_lists(), tmp_path / "model")
    report = run(source, tmp_path / "out", text)
    assert_report_measures_the_checkpoint(report, source, tmp_path / "out", text)


def test_blocks_that_are_given_more_of_the_tokens_are_refused(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was recorded for one window would be used for all of them."""
    forward = LlamaRotaryEmbedding.forward

    def of_the_tokens(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = forward(self, x, position_ids)
        return cos + x[..., :1], sin

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", of_the_tokens)
    with pytest.raises(PreflightError, match="more of the tokens than their hidden states"):
        run(model, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


def test_what_a_block_raises_is_found_before_anything_is_written(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(self: BlockRunner, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        raise AttributeError("no attribute 'seen_tokens'")

    monkeypatch.setattr(BlockRunner, "call", unknown)
    with pytest.raises(PreflightError, match="cannot be run block by block: no attribute 'seen_tokens'"):
        run(model, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


WAYS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried ..."),
]


@pytest.mark.parametrize(("place", "error"), list(zip(["_run_model", "call", "logits"], WAYS, strict=True)))
def test_memory_that_runs_out_is_no_matter_of_the_architecture(
    place: str, error: Exception, model: Path, text: Path, tmp_path: Path
) -> None:
    def refuse(self: BlockRunner, *_: object, **__: object) -> None:
        raise error

    output = tmp_path / "out"
    run(model, tmp_path / "expected", text, **RTN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockRunner, place, refuse)
        with pytest.raises(ResourceError, match="memory ran out") as caught:
            run(model, output, text, **RTN)
    assert caught.value.exit_code == 4
    assert caught.value.__cause__ is error
    assert caught.value.hint
    assert output.exists() == (place == "logits")  # only that is after preflight
    run(model, output, text, **RTN)
    assert digests(output) == digests(tmp_path / "expected")


def failing_with_two(error: Exception) -> Callable[..., Tensor]:
    call = BlockRunner.call

    def one_at_a_time(self: BlockRunner, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        if len(hidden) > 1 and not self._alone:
            raise error
        return call(self, index, block, hidden)

    return one_at_a_time


def test_memory_for_one_window_at_a_time_is_said(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(model, tmp_path / "expected", text, **RTN)
    for error, said in ((WAYS[2], True), (RuntimeError("a mask for one window"), False)):
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setattr(BlockRunner, "call", failing_with_two(error))
            report = run(model, tmp_path / f"out-{said}", text, **RTN)
        assert ("memory is enough for one window at a time only" in caplog.text) == said
        for row, wanted in zip(report.results, expected.results, strict=True):
            assert row["nll"] == pytest.approx(wanted["nll"], rel=1e-5)


def test_blocks_that_mix_windows_run_one_at_a_time(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They raise nothing, but give something else for two windows than for each."""
    expected = run(model, tmp_path / "expected", text, **RTN)
    call = BlockRunner.call

    def mixing(self: BlockRunner, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        output = call(self, index, block, hidden)
        return output if self._alone else output + output.mean(0) - output

    monkeypatch.setattr(BlockRunner, "call", mixing)
    report = run(model, tmp_path / "out", text, **RTN)
    for row, wanted in zip(report.results, expected.results, strict=True):
        assert row["nll"] == pytest.approx(wanted["nll"], rel=1e-5)
