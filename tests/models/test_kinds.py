"""What of a block is quantized and what stays, and why: by what it is and where it is, not by architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sweep
import torch
from safetensors.torch import load_file, save_file
from shrunk import shrunk
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import bitstrata
from bitstrata.checkpoint import CheckpointReader
from bitstrata.errors import PreflightError
from bitstrata.models import discover
from bitstrata.models.kinds import LinearInfo, is_experts, place_reason, size_reason


def save(name: str, folder: Path) -> Path:
    sweep.build(name)[0].save_pretrained(folder)
    return folder


def quantize(source: Path, output: Path, **settings: Any) -> bitstrata.Report:
    return bitstrata.quantize(source, output, bits=8, method="rtn", group_size=16, **settings)


def refusal(source: Path) -> str:
    with pytest.raises(PreflightError) as caught:
        quantize(source, source.parent / "refused")
    assert not (source.parent / "refused").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("outputs", "inputs", "head", "reason"),
    [
        (16, 16, None, None),
        (64, 15, None, "fewer than 16 inputs"),
        (15, 64, None, "fewer than 16 outputs"),
        (127, 16 * 127, None, "fewer than 128 outputs"),
        (127, 16 * 127 - 1, None, None),
        (128, 65536, None, None),
        (64, 4096, 64, None),
        (12, 4096, 12, None),
        (32, 4096, 64, "fewer than 128 outputs"),
        (64, 8, 64, "fewer than 16 inputs"),
    ],
)
def test_small_linears_stay(outputs: int, inputs: int, head: int | None, reason: str | None) -> None:
    found = size_reason(LinearInfo("a", inputs, outputs, False, False, 0), head)
    assert found is None if reason is None else found is not None and found.startswith(reason)


class TopKRouter(nn.Module):
    pass


def test_routers_indexers_and_decays_are_told_by_their_place() -> None:
    block = nn.Module()
    block.mlp = nn.Module()
    block.mlp.gate = nn.Linear(64, 512)
    block.mlp.gate_proj = nn.Linear(64, 512)
    block.dense = nn.Module()
    block.dense.gate = nn.Linear(64, 512)
    block.mlp.experts = nn.ModuleList()
    block.mlp.picks = TopKRouter()
    assert place_reason(block, "mlp.gate") == "router"
    assert place_reason(block, "mlp.picks.weight") == "router"
    assert place_reason(block, "mlp.gate_proj") is None
    assert place_reason(block, "dense.gate") is None
    for name, words in {
        "a.router.layer": "router", "a.modality_router": "router", "self_attn.indexer.wq_b": "indexer",
        "mlp.shared_expert_gate": "shared expert", "mixer.dt_proj": "decay", "mixer.A_log": "decay",
        "attn.forget_gate.f_b_proj": "decay", "linear_attn.in_proj_ba": "one number a head",
    }.items():  # fmt: skip
        assert words in str(place_reason(block, name))
    for name in ("self_attn.q_a_proj", "linear_attn.in_proj_qkv", "mlp.shared_experts.up_proj", "mixer.x_proj"):
        assert place_reason(block, name) is None


def test_experts_are_modules_called_so_with_matrices_of_three_dimensions() -> None:
    class TinyExperts(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.down_proj = nn.Parameter(torch.empty(shape))

    assert is_experts(TinyExperts(2, 3, 4))
    assert not is_experts(TinyExperts(3, 4))
    assert not is_experts(nn.Conv1d(2, 2, 3))


def test_a_hybrid_keeps_what_its_state_hangs_on_and_says_so(tmp_path: Path) -> None:
    report = quantize(save("qwen3_5_text", tmp_path / "source"), tmp_path / "out")
    kept = {entry["name"]: entry["reason"] for entry in report.left_out}
    first = "model.layers.0.linear_attn"
    assert kept[f"{first}.conv1d.weight"] == "convolution"
    for name in ("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias"):
        assert "decay" in kept[f"{first}.{name}"]
    layers = CheckpointReader(tmp_path / "out").spec.layers
    assert {f"{first}.in_proj_qkv", f"{first}.in_proj_z", f"{first}.out_proj"} < layers.keys()
    assert "model.layers.1.self_attn.q_proj" in layers
    source = load_file(tmp_path / "source" / "model.safetensors")
    stored = load_file(tmp_path / "out" / "model-common.safetensors")
    for name in kept:
        assert torch.equal(stored[name], source[name]), name


def test_a_linear_that_several_blocks_share_stays(tmp_path: Path) -> None:
    model, _ = sweep.build("zamba")
    found = discover(model)
    shared = [entry.name for entry in found.left_out if entry.reason == "shared by several layers"]
    assert any("shared_transf" in name for name in shared)
    assert not any("shared_transf" in linear.name for linear in found.linears)


def test_a_router_in_the_skip_list_is_no_error(tmp_path: Path) -> None:
    source = save("gemma3n_text", tmp_path / "source")
    report = quantize(source, tmp_path / "out", skip=["*.modality_router", "*.down_proj"])
    reasons = {entry["name"]: entry["reason"] for entry in report.left_out}
    assert reasons["model.layers.0.altup.modality_router.weight"] == "router"
    assert reasons["model.layers.0.mlp.down_proj.weight"] == "skipped by --skip *.down_proj"
    with pytest.raises(PreflightError, match=r"no linear layer matches --skip \*.rooter"):
        quantize(source, tmp_path / "other", skip="*.rooter")


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3"])
def test_a_wrapper_loads_in_its_class_with_its_towers_untouched(name: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "source")
    report = quantize(source, tmp_path / "out")
    layers = CheckpointReader(tmp_path / "out").spec.layers
    assert all(".language_model." in layer for layer in layers)
    towers = [entry["name"] for entry in report.left_out if "visual" in entry["name"] or "vision" in entry["name"]]
    assert towers
    original = AutoModelForImageTextToText.from_pretrained(source)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == type(original).__name__
    kept, stored = model.state_dict(), original.state_dict()
    assert all(torch.equal(kept[tower], stored[tower]) for tower in towers)
    ids = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = bitstrata.load(tmp_path / "out")(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, logits)
        text = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # of some that is the text model alone
        assert torch.equal(text(input_ids=ids).logits, logits)
        exact = original(input_ids=ids).logits
    assert float((logits - exact).norm() / exact.norm()) < 0.15


def test_a_wrapper_without_text_weights_is_refused_by_name(tmp_path: Path) -> None:
    source = save("qwen3_5", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    towers = {name: value for name, value in tensors.items() if "visual" in name}
    assert towers
    save_file(towers, source / "model.safetensors", {"format": "pt"})
    said = refusal(source)
    assert "stores no tensor for" in said
    assert "language_model" in said


def test_the_text_model_of_a_wrapper_alone_is_quantized_as_such(tmp_path: Path) -> None:
    model, _ = sweep.build("qwen3_5")
    text = AutoModelForCausalLM.from_config(model.config)
    assert type(text).__name__ == "Qwen3_5ForCausalLM"
    text.save_pretrained(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "out")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "Qwen3_5ForCausalLM"


@pytest.mark.parametrize(("depth", "lists"), [(3, 2), (2, 3), (1, 2)], ids=str)
def test_a_config_whose_depth_and_lists_disagree_is_refused(depth: int, lists: int, tmp_path: Path) -> None:
    source = save("qwen3_5_text", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    kinds = (["linear_attention", "full_attention", "full_attention"])[:lists]
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": depth, "layer_types": kinds}))
    assert "num_hidden_layers" in refusal(source)


def test_a_config_that_is_deeper_than_the_weights_is_refused(tmp_path: Path) -> None:
    source = save("qwen3_5_text", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    deeper = {"num_hidden_layers": 3, "layer_types": [*shrunk("qwen3_5_text").layer_types, "full_attention"]}
    (source / "config.json").write_text(json.dumps(config | deeper))
    assert "stores no tensor for model.layers.2" in refusal(source)
