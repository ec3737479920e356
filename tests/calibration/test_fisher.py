"""Squared gradients of the whole model's loss, window by window, against autograd used directly."""

from __future__ import annotations

from collections.abc import Callable
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


def tokens(windows: int, length: int) -> Tensor:
    return torch.randint(3, 64, (windows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_sum_over_windows_of_squared_gradients(variant: str, tmp_path: Path) -> None:
    folder = VARIANTS[variant](tmp_path / "model")
    runner = opened(folder)
    windows, counted = tokens(4, 20), []
    found = fisher_diagonal(runner, windows, lambda: counted.append(1))
    assert len(counted) == 4
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
    whole, again = (fisher_diagonal(runner, windows) for _ in range(2))
    parts = [fisher_diagonal(runner, window.unsqueeze(0)) for window in windows]
    for name in whole:
        assert torch.equal(whole[name], again[name])
        torch.testing.assert_close(whole[name], sum(part[name] for part in parts), rtol=1e-6, atol=0)


def test_skipped_layers_have_none(model: Path) -> None:
    runner = opened(model, ("*.q_proj",))
    found = fisher_diagonal(runner, tokens(1, 8))
    assert not any(name.endswith("q_proj") for name in found)
    assert any(name.endswith("k_proj") for name in found)


def test_gradients_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    runner = opened(folder)
    with pytest.raises(ModelError, match=r"model\.layers\.\d.*gradients") as caught:
        fisher_diagonal(runner, tokens(1, 8))
    assert "--preset fast" in (caught.value.hint or "")
    assert all(parameter.is_meta for parameter in runner.model.parameters()), "weights are still in memory"


def test_the_estimate_counts_the_model_the_sums_and_the_window(model: Path) -> None:
    runner = opened(model)
    weights = sum(parameter.numel() for parameter in runner.model.parameters())
    short, long = (fisher_bytes(runner.model, runner.discovery, seq_len) for seq_len in (8, 64))
    assert short > 4 * (weights + runner.discovery.weight_count)
    assert long - short == 56 * 4 * (2 * sum(x.in_features + x.out_features for x in runner.discovery.linears) + 3 * 64)
