"""How long a model's context is, for every way in which configs say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_llama
from transformers import AutoConfig, PreTrainedConfig

import bitstrata
from bitstrata.errors import BitstrataError
from bitstrata.models import context_limit

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}

# name -> (model type, settings, tokens)
CONFIGS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "plain": ("llama", {"max_position_embeddings": 4096}, 4096),
    "Qwen2.5 with yarn as its card says": (
        "qwen2",
        {
            "max_position_embeddings": 32768,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        },
        131072,
    ),
    "Qwen3 with yarn, the length raised too": (
        "qwen3",
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        },
        131072,
    ),
    "yarn without the original length": (
        "qwen2",
        {"max_position_embeddings": 1000, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        2000,
    ),
    "Vicuna-16k": (
        "llama",
        {"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}},
        16384,
    ),
    "dynamic": (
        "llama",
        {"max_position_embeddings": 2048, "rope_scaling": {"rope_type": "dynamic", "factor": 2.5}},
        5120,
    ),
    "as transformers 5 writes it": (
        "llama",
        {
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        },
        4096,
    ),
    "a factor below one": (
        "llama",
        {"max_position_embeddings": 2048, "rope_scaling": {"rope_type": "linear", "factor": 0.5}},
        2048,
    ),
    "Llama-3.2": (
        "llama",
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192, **LLAMA3,
            },
        },
        131072,
    ),
    "Phi-3 longrope": (
        "phi3",
        {
            "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096, "rope_scaling": {"type": "longrope", **LONG},
        },
        131072,
    ),
    "Gemma-3, whose sliding layers are not stretched": (
        "gemma3_text",
        {
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        131072,
    ),
    "learned positions": ("gpt2", {"n_positions": 1024}, 1024),
    "alibi of a fixed length": ("mpt", {"max_seq_len": 512}, 512),
    "alibi of any length": ("bloom", {}, None),
}  # fmt: skip


def config_of(name: str) -> tuple[PreTrainedConfig, int | None]:
    model_type, settings, expected = CONFIGS[name]
    return AutoConfig.for_model(model_type, **settings), expected


@pytest.mark.parametrize("name", CONFIGS)
def test_the_context_of_a_config(name: str) -> None:
    config, expected = config_of(name)
    assert context_limit(config) == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_the_context_survives_being_saved(name: str, tmp_path: Path) -> None:
    config, expected = config_of(name)
    config.save_pretrained(tmp_path)
    assert context_limit(AutoConfig.from_pretrained(tmp_path)) == expected


def test_a_stretched_model_generates_beyond_its_first_length(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    source = tiny_llama(tmp_path / "source", rope_scaling=scaling)
    bitstrata.quantize(source, tmp_path / "out", bits=8, method="rtn", group_size=16)
    assert 0 < bitstrata.generate(tmp_path / "out", "a" * 90, max_new_tokens=10).tokens <= 10
    with pytest.raises(BitstrataError, match="256"):
        bitstrata.generate(tmp_path / "out", "a" * 300, max_new_tokens=10)
