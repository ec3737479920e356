"""A tiny random config of each causal architecture of transformers that can be made tiny, and what becomes of it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SHARED: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 72, "vocab_size": 96, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "head_dim": 8, **_EXPERTS,
}  # fmt: skip
_PLAIN: dict[str, Any] = {}
_ENCODER: dict[str, Any] = {"is_decoder": True}
_HALF: dict[str, Any] = {  # the decoder of an encoder-decoder, alone
    "is_encoder_decoder": False, "is_decoder": True, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 72, "decoder_ffn_dim": 72,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_MAMBA: dict[str, Any] = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 8}

# model type -> settings beyond the shared ones; None takes one of those out
RIGHT: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "apertus", "arcee", "beam", "biogpt", "bitnet", "bloom", "cohere", "cohere2", "ctrl", "cwm", "diffllama",
            "doge", "ernie4_5", "exaone4", "falcon", "flint", "fuyu", "gemma", "gemma2", "gemma3_text",
            "gemma4_unified_text", "glm", "glm4", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_neox_japanese",
            "granite", "granite_swa", "hyperclovax", "internlm3", "iquestcoder", "jais2", "lfm2", "llama",
            "ministral3", "mistral", "modernbert-decoder", "moshi", "mpt", "nanochat", "nemotron", "olmo", "olmo2",
            "olmo3", "openai-gpt", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3",
            "starcoder2", "vaultgemma", "xglm",
            # a small convolution, a recurrent state
            "falcon_h1", "falcon_mamba", "lfm3", "mamba", "qwen3_5_text", "recurrent_gemma", "rwkv",
        ),
        _PLAIN,
    ),
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "glm_moe_dsa", "minicpm3", "youtu"), _LATENT),
    **dict.fromkeys(
        (
            "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
            "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
        ),
        _ENCODER,
    ),
    **dict.fromkeys(
        (
            "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
            "trocr", "whisper",
        ),
        _HALF,
    ),
    "codegen": {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 64, "n_ctx": 64, "rotary_dim": 8},
    "gemma3": {
        "text_config": {**_SHARED, "head_dim": 12, "query_pre_attn_scalar": 12}, "vision_config": _VISION,
        "mm_tokens_per_image": 4, "image_token_index": 93, "boi_token_index": 94, "eoi_token_index": 95,
    },
    "gemma3n_text": {
        "head_dim": 12, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
        "altup_num_inputs": 2, "laurel_rank": 4, "layer_types": ["sliding_attention", "full_attention"],
        "intermediate_size": [72, 72],
    },
    "git": {"vision_config": _VISION},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 64, "rotary_dim": 8},
    "helium": {"head_dim": 12},
    "hunyuan_v1_dense": {"head_dim": 12},
    "ministral": {"head_dim": 12},
    "mamba2": {"num_heads": 6, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "prophetnet": {
        "num_hidden_layers": None, "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4, "encoder_ffn_dim": 72, "decoder_ffn_dim": 72, "is_encoder_decoder": False,
        "is_decoder": True,
    },
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 32], "attention_head_size": 12, "feed_forward_size": 72,
        "local_attn_chunk_length": 8,
    },
    "stablelm": {"partial_rotary_factor": 0.5},
    "xlm": {"emb_dim": 48, "n_layers": 2, "n_heads": 4, "causal": True},
    "xlstm": {"num_heads": 4, "num_blocks": 2},
    "xmod": {"is_decoder": True, "default_language": "en_XX", "languages": ("en_XX",)},
}  # fmt: skip

_UNKNOWN = "mixture of experts"

# model type -> settings, and words of the refusal
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    **dict.fromkeys(("hrm_text", "inkling2_text"), ({}, "merges or splits")),
    "jetmoe": ({}, _UNKNOWN),
    "longcat_flash": (_LATENT, _UNKNOWN),
    "cpmant": ({}, "sees later tokens"),
    **{name: ({}, "sees later tokens") for name, more in RIGHT.items() if more is _ENCODER},
    **{name: ({**more, "causal": False}, "sees later tokens") for name, more in RIGHT.items() if name == "xlm"},
}  # fmt: skip

# One of each way to hold blocks, projections, tied heads and experts; the others run with make test-slow.
REPRESENTATIVE = {
    "bart", "bert", "bloom", "codegen", "cohere2", "deepseek_v3", "falcon", "fuyu", "gemma2", "gemma3", "gemma3n_text",
    "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "lfm2", "lfm3", "llama", "mpt", "olmo2", "opt", "persimmon",
    "phi3", "qwen3", "qwen3_5_text", "reformer", "whisper", "xlm", "xlstm",
    "bamba", "cpmant", "jetmoe", "mamba",
}  # fmt: skip


def build(model_type: str, settings: dict[str, Any], seed: int) -> PreTrainedModel:
    """A random model, fp32, in evaluation mode; its weights are wide enough that outputs depend on every layer."""
    given = {key: value for key, value in {**_SHARED, **copy.deepcopy(settings)}.items() if value is not None}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **given)).float().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.15)
    return model
