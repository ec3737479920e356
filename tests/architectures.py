"""Tiny random configs of the architectures that discovery and loading are checked on."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SHARED = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 72,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# name -> (model type, settings beyond the shared ones)
CONFIGS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 12, "sliding_window": 16, "query_pre_attn_scalar": 12}),
    "gemma3": ("gemma3_text", {"head_dim": 12, "sliding_window": 16, "query_pre_attn_scalar": 12}),
    "phi3": ("phi3", {"original_max_position_embeddings": 64}),
    "opt": (
        "opt",
        {"ffn_dim": 72, "word_embed_proj_dim": 32, "num_key_value_heads": None, "intermediate_size": None},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "qwen3_moe",
        {"head_dim": 16, "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 40},
    ),
    "gpt-neox": ("gpt_neox", {"rotary_pct": 0.5, "num_key_value_heads": None}),
    "gpt2": (
        "gpt2",
        {
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            **dict.fromkeys(
                (
                    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                    "intermediate_size", "max_position_embeddings",
                )
            ),
        },
    ),
}  # fmt: skip


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model of architecture `name`, fp32, in evaluation mode."""
    model_type, extra = CONFIGS[name]
    settings = {key: value for key, value in {**_SHARED, **extra}.items() if value is not None}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).float().eval()
    for parameter in model.parameters():  # larger than the usual start, so that outputs depend on every layer
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def save(name: str, folder: Path, seed: int = 0) -> PreTrainedModel:
    """Build, save to `folder` and return the model."""
    model = build(name, seed)
    model.save_pretrained(folder)
    return model
