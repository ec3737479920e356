"""Squared gradients of the whole model's loss, window by window, against autograd used directly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_gpt2, tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitstrata.calibration import BlockRunner, fisher_bytes, fisher_diagonal
from bitstrata.errors import ModelError
from bitstrata.models import SourceModel, discover

VARIANTS: dict[str, Callable[[Path], Path]] = {
    "llama": tiny_llama,
    "llama with tied embeddings": lambda folder: tiny_llama(folder, tie_word_embeddings=True),
    "gpt2, transposed and tied": tiny_gpt2,
}


def opened(folder: Path, skip: tuple[str, ...] = ()) -> BlockRunner:
    source = SourceModel(folder)
    skeleton = source.skeleton()
    return BlockRunner(source, skeleton, discover(skeleton, skip), 20, torch.device("cpu"))


def fisher(runner: BlockRunner, windows: Tensor, step: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    order: list[int] = []

    def keep(index: int, of: Mapping[str, Tensor]) -> None:
        assert set(of) == {linear.name for linear in runner.discovery.of_block(index)}
        order.append(index)
        found.update(of)

    fisher_diagonal(runner, windows, keep, step=step)
    assert order == sorted(order, reverse=True)
    return found


def tokens(windows: int, length: int) -> Tensor:
    return torch.randint(3, 64, (windows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_sum_over_windows_of_squared_gradients(variant: str, tmp_path: Path) -> None:
    folder = VARIANTS[variant](tmp_path / "model")
    runner = opened(folder)
    windows, counted = tokens(4, 20), []
    found = fisher(runner, windows, lambda: counted.append(1))
    assert len(counted) == 2 * len(runner.discovery.blocks) + 1
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in runner.model.parameters())
    assert set(found) == {linear.name for linear in runner.discovery.linears}

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = dict.fromkeys(found, torch.zeros(()))
    for window in windows:
        model.zero_grad()
        model(input_ids=window.unsqueeze(0), labels=window.unsqueeze(0)).loss.backward()
        for name in found:
            expected[name] = expected[name] + model.get_parameter(f"{name}.weight").grad.square()
    for linear in runner.discovery.linears:
        wanted, mine = expected[linear.name], found[linear.name]
        assert mine.dtype == torch.float32
        assert mine.shape == (linear.out_features, linear.in_features)
        torch.testing.assert_close(mine, wanted.T if linear.transposed else wanted, rtol=1e-3, atol=1e-9)


def test_windows_add_up_and_the_same_call_gives_the_same_numbers(model: Path) -> None:
    runner = opened(model)
    windows = tokens(3, 16)
    whole, again = (fisher(runner, windows) for _ in range(2))
    parts = [fisher(runner, window.unsqueeze(0)) for window in windows]
    for name in whole:
        assert torch.equal(whole[name], again[name])
        torch.testing.assert_close(whole[name], sum(part[name] for part in parts), rtol=1e-6, atol=0)


def test_skipped_layers_have_none(model: Path) -> None:
    runner = opened(model, ("*.q_proj",))
    found = fisher(runner, tokens(1, 8))
    assert not any(name.endswith("q_proj") for name in found)
    assert any(name.endswith("k_proj") for name in found)


def test_gradients_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    runner = opened(folder)
    with pytest.raises(ModelError, match=r"model\.layers\.\d.*gradients") as caught:
        fisher(runner, tokens(1, 8))
    assert "--preset fast" in (caught.value.hint or "")
    assert all(parameter.is_meta for parameter in runner.model.parameters()), "weights are still in memory"


def test_the_estimate_is_of_one_block_and_a_window_however_many_blocks_there_are(tmp_path: Path) -> None:
    few, many = (opened(tiny_llama(tmp_path / str(count), num_hidden_layers=count)) for count in (2, 9))
    short, long, deep = (
        fisher_bytes(of.model, of.discovery, seq_len) for of, seq_len in ((few, 300), (few, 364), (many, 300))
    )
    assert short == deep
    linears = few.discovery.of_block(1)
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    assert short > 4 * 2 * weights
    assert long - short == 64 * 4 * 2 * sum(linear.in_features + linear.out_features for linear in linears)
    assert fisher_bytes(few.model, few.discovery, 1) < 4 * sum(map(torch.Tensor.numel, many.model.parameters()))


def test_only_a_block_is_in_memory_and_files_are_gone(tmp_path: Path) -> None:
    runner = opened(tiny_llama(tmp_path / "model", num_hidden_layers=4))
    held = []

    def look() -> None:
        here = {name.split(".")[2] for name, each in runner.model.named_parameters() if not each.is_meta}
        held.append(here)

    call = runner.call

    def called(index: int, block: torch.nn.Module, hidden: Tensor) -> Tensor:
        look()
        return call(index, block, hidden)

    runner.call = called  # type: ignore[method-assign]
    fisher(runner, tokens(2, 8))
    assert held == [{str(index)} for index in (0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 2, 2, 1, 1, 0, 0)]
