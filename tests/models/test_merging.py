"""Adapters of dense models, merged into them before they are quantized."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

import bitstrata
from bitstrata.checkpoint import CheckpointReader
from bitstrata.errors import ModelError, UsageError
from bitstrata.models.merging import merged
from bitstrata.options import FromHub
from bitstrata.planes import decode

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """Trained elsewhere, that is to say random; without a tokenizer, as PEFT alone writes it."""
    folder = tmp_path_factory.mktemp("adapter") / "mine"
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["up_proj", "q_proj"], init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


@pytest.fixture
def beside(base, adapter, tmp_path) -> Path:
    """The adapter in the folder of its model."""
    folder = Path(shutil.copytree(base, tmp_path / "beside"))
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    return folder


def expected(base: Path, adapter: Path) -> torch.Tensor:
    stored = load_file(adapter / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.{LAYER}.lora_{part}.weight"].double() for part in "AB")
    return load_file(base / "model.safetensors")[f"{LAYER}.weight"].double() + 2 * b @ a


@pytest.mark.parametrize("place", ["adapter", "beside"])
def test_the_sum_is_what_is_quantized(place, base, adapter, beside, tmp_path):
    given = {"adapter": adapter, "beside": beside}[place]
    before = {path: path.read_bytes() for path in given.iterdir()}
    bitstrata.quantize(given, tmp_path / "out", bits=8, method="rtn", group_size=16, merge_adapter=True)
    assert {path: path.read_bytes() for path in given.iterdir()} == before
    reader = CheckpointReader(tmp_path / "out")
    found = decode(reader.layer(LAYER), 8, torch.float64)
    weight = expected(base, adapter)
    step = (weight.amax() - weight.amin()) / 255
    torch.testing.assert_close(found, weight, rtol=0, atol=float(step))
    assert reader.spec.provenance["model"] == given.name
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_the_merged_model_is_exact(base, adapter):
    model, home = merged(adapter, FromHub())
    weight = expected(base, adapter)
    torch.testing.assert_close(model.get_submodule(LAYER).weight.double(), weight, rtol=1e-6, atol=1e-6)
    assert home == base


def change(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"base_model_name_or_path": None}, "does not name its model"),
        ({"base_model_name_or_path": "./not-there"}, "there is no model folder './not-there'"),
        ({"peft_type": "IA3"}, "is a IA3Config, not a LoRA adapter"),
        ({"target_modules": ["nothing"]}, "cannot be merged"),
    ],
)
def test_what_cannot_be_merged_is_named(fields, said, adapter, tmp_path):
    folder = Path(shutil.copytree(adapter, tmp_path / "changed"))
    change(folder, **fields)
    with pytest.raises(ModelError, match=said):
        bitstrata.quantize(folder, tmp_path / "out", bits=4, method="rtn", merge_adapter=True)
    assert not (tmp_path / "out").exists()


def test_a_model_without_an_adapter(base, tmp_path):
    with pytest.raises(UsageError, match="holds no adapter"):
        bitstrata.quantize(base, tmp_path / "out", bits=4, method="rtn", merge_adapter=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(UsageError, match="in a folder or on the hub"):
        bitstrata.quantize(model, tmp_path / "out", bits=4, method="rtn", merge_adapter=True)
