"""A source model that cannot be quantized: one clear message, exit code 3, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_outcome import Command
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

LAYER = "model.layers.1.mlp.up_proj.weight"
Damage = Callable[[Path], None]


def weights(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change the tensors of the model."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def replaced(make: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return weights(lambda tensors: tensors.update({LAYER: make(tensors[LAYER])}))


def one_weight(value: float) -> Damage:
    return weights(lambda tensors: tensors[LAYER].__setitem__((3, 5), value))


def config(**values: Any) -> Damage:
    def damage(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, **values}))

    return damage


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def file(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)  # type: ignore[return-value]


def index(content: str) -> Damage:
    """The weights in a shard, and an index over it."""

    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(content)

    return damage


def index_of(files: dict[str, Any]) -> Damage:
    return index(json.dumps({"weight_map": files}))


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


DAMAGES: dict[str, tuple[Damage, list[str]]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ["has no config.json"]),
    "config is not JSON": (file("config.json", "{"), ["config.json cannot be used"]),
    "unknown architecture": (config(model_type="nonsense"), ["config.json cannot be used", "nonsense"]),
    "not a causal model": (config(model_type="vit"), ["'vit' is not a causal language model"]),
    "already quantized": (config(quantization_config={"quant_method": "gptq", "bits": 4}), ["already quantized"]),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["has no model.safetensors"]),
    "pickles only": (only_pickles, ["has no model.safetensors", "convert the .bin files"]),
    "truncated weights": (cut, ["model.safetensors is not a whole safetensors file"]),
    "empty weights": (file("model.safetensors", ""), ["model.safetensors is not a whole safetensors file"]),
    "a tensor is missing": (weights(lambda tensors: tensors.pop(LAYER)), [f"stores no tensor for {LAYER}"]),
    "wrong shape": (replaced(lambda w: torch.zeros(3, 3)), [LAYER, "[96, 64]", "[3, 3]"]),
    "transposed": (replaced(lambda w: w.T.contiguous()), [LAYER, "[96, 64]", "[64, 96]"]),
    "NaN": (one_weight(float("nan")), [f"{LAYER} holds NaN or infinity"]),
    "infinity": (one_weight(-float("inf")), [f"{LAYER} holds NaN or infinity"]),
    "NaN outside the blocks": (
        weights(lambda tensors: tensors["model.embed_tokens.weight"].fill_(torch.nan)),
        ["model.embed_tokens.weight holds NaN or infinity"],
    ),
    "too large for fp16": (one_weight(1e6), [f"{LAYER} has weights above 65504"]),
    "integers": (replaced(lambda w: w.to(torch.int32)), [f"{LAYER} holds torch.int32"]),
    "8-bit floats": (replaced(lambda w: w.to(torch.float8_e4m3fn)), [LAYER, "is stored in fp8 without scales"]),
    "index is not JSON": (index("nonsense"), ["is not a valid index"]),
    "index without a map": (index("{}"), ["is not a valid index"]),
    "index with a list for a map": (index('{"weight_map": [1]}'), ["is not a valid index"]),
    "index without an end": (index("[" * 100_000), ["is not a valid index"]),
    "index names a missing shard": (
        index_of({LAYER: "model-9.safetensors"}),
        ["shard model-9.safetensors is missing"],
    ),
    "index promises a missing tensor": (
        index_of({"no.such": "model-1.safetensors"}),
        ["lacks no.such that the index promises"],
    ),
    **{
        f"index names {file!r}": (index_of({LAYER: file}), ["is not a file name"])
        for file in ("../model.safetensors", "/etc/hostname", "\ud800", "a\0b", "", ".", 7, None)
    },
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_refused_with_its_reason(name: str, model: Path, tmp_path: Path, cli: Command) -> None:
    damage, said = DAMAGES[name]
    source = Path(shutil.copytree(model, tmp_path / "model"))
    damage(source)
    outcome = cli("quantize", source, "-o", tmp_path / "out", "--method", "bcq")
    outcome.refused(3, *said)
    assert not (tmp_path / "out").exists()


def test_a_missing_shard_is_named(model: Path, tmp_path: Path, cli: Command) -> None:
    source = Path(shutil.copytree(model, tmp_path / "model"))
    (source / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(source, max_shard_size="60KB")
    shards = sorted(source.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    outcome = cli("quantize", source, "-o", tmp_path / "out", "--method", "bcq")
    outcome.refused(3, f"shard {shards[1].name} is missing")
    assert not (tmp_path / "out").exists()


def test_a_model_in_shards_is_quantized_like_one_in_a_file(model: Path, tmp_path: Path, cli: Command) -> None:
    source = Path(shutil.copytree(model, tmp_path / "model"))
    (source / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(source, max_shard_size="60KB")
    for folder, output in ((model, "one"), (source, "shards")):
        arguments = ["--method", "rtn", "--bits", "2", "--group-size", "32"]
        assert cli("quantize", folder, "-o", tmp_path / output, *arguments).code == 0
    for name in ("model-common", "model-plane-0", "model-bits-2"):
        one, other = (tmp_path / output / f"{name}.safetensors" for output in ("one", "shards"))
        assert one.read_bytes() == other.read_bytes(), name


def test_no_flipped_bit_of_the_header_crashes(model: Path, tmp_path: Path, cli: Command) -> None:
    """Any bit of the header flipped: either refused with a reason, or it did not matter."""
    source = Path(shutil.copytree(model, tmp_path / "model"))
    path = source / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    draw = torch.randperm(8 * header, generator=torch.Generator().manual_seed(0))
    refused = 0
    for bit in [*range(0, 64, 5), *draw[:60].tolist()]:
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        outcome = cli("quantize", source, "-o", tmp_path / "out", "--method", "rtn", "--dry-run")
        assert outcome.code in (0, 3), f"bit {bit}: exit code {outcome.code}: {outcome.err}"
        assert "Traceback" not in outcome.err
        refused += outcome.code == 3
        assert not (tmp_path / "out").exists()
    assert refused > 50


@pytest.mark.parametrize(
    ("source", "said"),
    [("nowhere", "is not a local folder"), ("./nowhere", "there is no model folder"), ("text.txt", "is a file")],
)
def test_what_is_no_model_at_all_is_refused(
    source: str, said: str, tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("words")
    cli("quantize", source, "-o", "out", "--method", "bcq").refused(3, said)
    assert not (tmp_path / "out").exists()


def test_a_model_without_its_tokenizer_needs_none_unless_there_is_text(
    model: Path, text: Path, tmp_path: Path, cli: Command
) -> None:
    source = Path(shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*")))
    outcome = cli("quantize", source, "-o", tmp_path / "out", "--method", "bcq", "--calibration", text)
    outcome.refused(3, "has no usable tokenizer")
    assert not (tmp_path / "out").exists()
    arguments = ["--method", "rtn", "--group-size", "32"]
    assert cli("quantize", source, "-o", tmp_path / "out", *arguments).code == 0
    cli("eval", tmp_path / "out", "--text", text).refused(3, "has no usable tokenizer")
    cli("generate", tmp_path / "out", "words").refused(3, "has no usable tokenizer")


def test_a_tokenizer_of_another_model_is_noticed(model: Path, text: Path, tmp_path: Path, cli: Command) -> None:
    source = tiny_llama(tmp_path / "model", vocab_size=16)
    outcome = cli("quantize", source, "-o", tmp_path / "out", "--method", "bcq", "--calibration", text, "--seq-len", 32)
    outcome.refused(3, "the model knows 16 tokens")
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_not_quantized_again(quantized: Path, tmp_path: Path, cli: Command) -> None:
    outcome = cli("quantize", quantized, "-o", tmp_path / "out", "--method", "rtn")
    outcome.refused(3, "is already quantized by bitstrata")
    assert not (tmp_path / "out").exists()
