"""Tiny random checkpoints of several architectures; two workers can share the layers of all but the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from shrunk import randomized
from tiny_models import VOCABULARY, save

import bitstrata

GROUP = 32
SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
# architecture -> its config's class, what it has beside SIZES, and of the head the bits
MODELS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 1, "tie_word_embeddings": False}, 5),  # a head of its own
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}, 4),
    "gemma3": (
        "Gemma3TextConfig",
        {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 32},
        None,
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**EXPERTS, "tie_word_embeddings": False}, 5),
    # experts beside a shared one with a gate, of a width that two workers cannot share; biases of q, k and v
    "qwen2_moe": ("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 96, "norm_topk_prob": True}, None),
}


def quantized(name: str, folder: Path) -> Path:
    """The model `name` at 2 to 4 bits; returns its folder."""
    kind, more, head = MODELS[name]
    config = getattr(transformers, kind)(**{**SIZES, **more})
    torch.manual_seed(0)
    model = randomized(transformers.AutoModelForCausalLM.from_config(config), 0)
    for key, parameter in model.named_parameters():
        if key.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    source = save(model, folder / "source")
    out = folder / name
    bitstrata.quantize(str(source), str(out), bits=[2, 3, 4], group_size=GROUP, method="rtn", head_bits=head)
    return out
