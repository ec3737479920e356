"""Running a model block by block gives what the whole model gives, and holds no more than it must."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitstrata.calibration import BlockRunner, block_runner
from bitstrata.errors import ModelError
from bitstrata.models import SourceModel, discover

VARIANTS: dict[str, Callable[[Path], Path]] = {
    "llama": tiny_llama,
    "llama with tied embeddings": lambda folder: tiny_llama(folder, tie_word_embeddings=True),
    "gpt2": tiny_gpt2,
}


def make_runner(folder: Path, seq_len: int) -> BlockRunner:
    source = SourceModel(folder)
    skeleton = source.skeleton()
    return BlockRunner(source, skeleton, discover(skeleton), seq_len, torch.device("cpu"))


def tokens(windows: int, length: int) -> Tensor:
    return torch.randint(3, 64, (windows, length), generator=torch.Generator().manual_seed(0))


def on_meta(runner: BlockRunner) -> bool:
    return all(parameter.is_meta for parameter in runner.model.parameters())


def logits_by_blocks(runner: BlockRunner, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Targets [n, S - 1] and logits [n, S - 1, vocab] from the runner alone."""
    hidden = runner.embed(ids)
    for index in range(len(runner.discovery.blocks)):
        with runner.block(index) as block:
            hidden = runner.run(index, block, hidden)
    targets, logits = zip(*((t, x["chain"]) for t, x in runner.logits({"chain": hidden}, ids)), strict=True)
    shape = (len(ids), ids.shape[1] - 1)
    return torch.cat(targets).view(shape), torch.cat(logits).view(*shape, -1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("windows", "length"), [(1, 40), (5, 17)])
def test_blocks_in_a_row_are_the_model(variant: str, windows: int, length: int, tmp_path: Path) -> None:
    folder = VARIANTS[variant](tmp_path / "model")
    runner, ids = make_runner(folder, length), tokens(windows, length)
    targets, logits = logits_by_blocks(runner, ids)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[:, :-1]
    assert torch.equal(targets, ids[:, 1:])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert on_meta(runner), "weights are still in memory"


def test_small_batches_and_short_stretches_change_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(7, 20)
    expected = logits_by_blocks(make_runner(model, 20), ids)[1]
    monkeypatch.setattr(block_runner, "TOKENS_PER_BATCH", 41)  # two windows a batch
    runner = make_runner(model, 20)
    assert runner._batch == 2
    torch.testing.assert_close(logits_by_blocks(runner, ids)[1], expected, rtol=1e-5, atol=1e-5)


def test_only_the_block_at_work_is_in_memory(model: Path) -> None:
    runner = make_runner(model, 8)
    runner.embed(tokens(1, 8))
    assert on_meta(runner)
    with runner.block(1) as block:
        assert not any(parameter.is_meta for parameter in block.parameters())
        assert {parameter.dtype for parameter in block.parameters()} == {torch.float32}
        inside = {id(parameter) for parameter in block.parameters()}
        assert all(parameter.is_meta for parameter in runner.model.parameters() if id(parameter) not in inside)
    assert on_meta(runner)


def test_weights_are_released_when_something_fails_too(model: Path) -> None:
    runner = make_runner(model, 8)
    runner.embed(tokens(1, 8))
    with pytest.raises(ZeroDivisionError), runner.block(0):
        raise ZeroDivisionError
    assert on_meta(runner)
    with pytest.raises(ModelError):
        runner.embed(torch.full((1, 8), 10**6))
    assert on_meta(runner)
    blocks = list(runner.model.get_submodule("model.layers").children())
    assert [type(block).__name__ for block in blocks] == ["LlamaDecoderLayer"] * 2, "a stand-in was left behind"


def test_several_chains_are_kept_apart(model: Path) -> None:
    runner, ids = make_runner(model, 8), tokens(2, 8)
    hidden = runner.embed(ids)
    for _, logits in runner.logits({"one": hidden, "other": hidden + 1, "same": hidden}, ids):
        assert list(logits) == ["one", "other", "same"]
        assert torch.equal(logits["one"], logits["same"])
        assert not torch.equal(logits["one"], logits["other"])


def test_a_call_is_differentiable_in_the_blocks_parameters(model: Path) -> None:
    runner, ids = make_runner(model, 8), tokens(3, 8)
    hidden = runner.embed(ids)
    with runner.block(0) as block:
        weight = block.get_submodule("mlp.down_proj").weight
        assert isinstance(weight, Tensor)
        weight.requires_grad_()
        runner.call(0, block, hidden).square().sum().backward()
        assert weight.grad is not None
        assert bool(weight.grad.any())


def test_a_block_that_returns_something_else_is_an_error(model: Path) -> None:
    runner = make_runner(model, 8)
    hidden = runner.embed(tokens(1, 8))

    class Pair(torch.nn.Module):
        def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
            return hidden, hidden

    with pytest.raises(ModelError, match=r"model\.layers\.1 returned tuple"):
        runner.call(1, Pair(), hidden)
