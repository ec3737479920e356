"""Layers that predict further tokens are kept in a file of their own, or dropped, and named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama

import bitstrata
from bitstrata.errors import PreflightError

EXTRA = ("mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight", "model.layers.2.self_attn.q_proj.weight")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tiny_llama(tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors |= {name: torch.randn(8, 16, generator=generator).bfloat16() for name in EXTRA}
    save_file(tensors | {"model.rotary.inv_freq": torch.ones(4)}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("drop", [False, True], ids=["kept", "dropped"])
def test_they_are_kept_or_dropped_and_named(source: Path, drop: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = bitstrata.quantize(source, out, bits=3, method="rtn", group_size=16, drop_mtp=drop)
    reasons = {entry["name"]: entry["reason"] for entry in report.left_out if "MTP" in entry["reason"]}
    assert reasons.keys() == set(EXTRA)
    assert all(("dropped" if drop else "kept in mtp.safetensors") in reason for reason in reasons.values())
    assert any("3 tensors of layers that predict further tokens" in note for note in report.notes)
    assert any("1 stored tensors are not part of the model and are dropped" in note for note in report.notes)
    assert (out / "mtp.safetensors").exists() is not drop
    if not drop:
        stored = load_file(source / "model.safetensors")
        kept = load_file(out / "mtp.safetensors")
        assert kept.keys() == set(EXTRA)
        assert all(torch.equal(kept[name], stored[name]) for name in EXTRA)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert bitstrata.load(out)(ids).logits.isfinite().all()


def test_a_finished_result_with_them_is_another_than_one_without(source: Path, tmp_path: Path) -> None:
    settings = {"bits": 3, "method": "rtn", "group_size": 16}
    bitstrata.quantize(source, tmp_path / "out", **settings)
    with pytest.raises(PreflightError, match="drop_mtp"):
        bitstrata.quantize(source, tmp_path / "out", drop_mtp=True, **settings)
