"""Tiny random models of any architecture of transformers: its default config with every size made small by its name.

A size is told by the name of its field, the same way in a text model and in what sees or hears, so that widths which
have to agree do. Lists with an entry a layer keep one layer of each kind. A few configs need more: `EXCEPTIONS`.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

VOCABULARY, CONTEXT = 64, 64  # tokens, those of tiny_models.py among them

# the name of a field -> its size, the first that matches
SIZES: list[tuple[re.Pattern[str], int]] = [
    (re.compile(pattern), size)
    for pattern, size in [
        (r"bos_token_id", 0), (r"eos_token_id", 1), (r"pad_token_id", 2),
        (r"(decoder_|unpadded_|audio_|mel_)?vocab_size(_per_layer_input)?|vocab_offset|vocab_dim", VOCABULARY),
        (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length|seq_length", CONTEXT),
        (r"original_max_position_embeddings|max_(target|source)_positions", CONTEXT),
        (r"(swa_|mamba_)?num_(sliding_)?(attention_heads|heads)|n_heads?|attention_heads", 4),
        (r"(num_)?(en|de)coder_attention_heads|linear_num_(value_|key_)?heads|mamba_num_heads|resampler_(n_)?heads", 4),
        (r"(swa_|vision_|linear_)?num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups", 2),
        (r"(swa_|attention_|linear_|linear_key_|linear_value_|mamba_|resampler_)?head_dim|d_kv|dim_head|d_head", 16),
        (r"kv_channels|attention_head_size|resampler_dim_head|attention_head_dim", 16),
        (r"(n_|number_of_|num_)?(local_|routed_)?experts|moe_num_experts|n_routed_experts", 4),
        (r"num_experts_per_tok(en)?|moe_top_?k|moe_k", 2),
        (r"(n|num|moe_num)_shared_experts", 1),
        (r"n_group|topk_group|num_expert_group", 1),
        (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
        (r"q_lora_rank|kv_lora_rank|qk_head_dim|hc_lowrank|o_lora_rank", 32),
        (r"qk_(nope|rope)_head_dim|v_head_dim|index_head_dim", 16),
        (r"index_n_heads", 4), (r"index_topk|attention_window_size|local_attention(_window_len)?", 16),
        (r"sliding_window(_size)?|window_size|attention_chunk_size|mem_len|keep_window_size", 16),
        (r"(lsh_|local_)?attn_chunk_length|floor_scale|mamba_chunk_size|chunk_size", 8),
        (r"mamba_d_state|state_size|ssm_state_size", 8), (r"mamba_d_head|mamba_headdim|mamba_head_dim", 32),
        (r"mamba_n_heads|n_mamba_heads", 4), (r"mamba_dt_rank|time_step_rank|laurel_rank|adapter_rank", 16),
        (r"n_groups|mamba_n_?groups", 1), (r"mamba_d_ssm|lru_width", 128),
        (r"rotary_dim", 8), (r"altup_num_inputs", 2), (r"hidden_size_per_layer_input", 16),
        (r"query_pre_attn_scalar", 16), (r"image_size|crop_size|img_size", 28), (r"patch_size", 14),
        (r"mm_tokens_per_image", 4), (r"num_kv_shared_layers", 0),
        (r".*(hidden_size|hidden_dim|embedding_size|embed_dim|output_dim|embedding_dim|d_model|n_embd|emb_dim)", 64),
        (r"dim_model|hidden_size_global|word_embed_proj_dim|projection_dim|.*out_dim|projector_input_dim|in_dim", 64),
        (r"output_hidden_size|out_hidden_size|attention_hidden_size", 64),
        (r".*(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|dim_ff|dff|d_ff|mlp_dim|feed_forward_size|d_inner)", 96),
        (r"n_inner|ffn_intermediate_size|expert_dim|share_expert_dim", 96),
        (r"num_(position_embeddings|patches)|position_embedding_size", 16),
    ]
]  # fmt: skip
DEPTHS = re.compile(r"num_hidden_layers|n_layers?|(num_)?(en|de)coder_layers|depth|num_blocks|(num_)?layers")

_ENCODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
)  # fmt: skip
_HALVES = (  # the decoder of an encoder-decoder, alone
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
    "prophetnet", "trocr", "whisper",
)  # fmt: skip
_THREE_AXES = (  # rotary positions in time, height and width
    "glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl",
)  # fmt: skip
_ROTATED: dict[str, Any] = {
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
    }
}
_INDEXER: dict[str, Any] = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}  # fmt: skip
# model type -> what is set beside that; a value of None takes a field out
EXCEPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"head_dim": 16} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    **{name: {"is_decoder": True} for name in _ENCODERS},
    **{name: {"is_decoder": True, "is_encoder_decoder": False} for name in _HALVES},
    **{name: {"text_config": {"rope_parameters": {"mrope_section": [2, 3, 3]}}} for name in _THREE_AXES},
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 60}},
    "cohere_compass": {"text_config": _ROTATED},
    "cohere_compass_text": _ROTATED,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32},
    "dots3_note": {"text_config": {"head_dim": 32}},
    "dots3_note_text": {"head_dim": 32},
    "emu3": {"vocabulary_map": {"<image>": 60, "<|extra_200|>": 61}},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {"text_config": _INDEXER},
    "zamba": {
        "num_hidden_layers": 3, "attention_hidden_size": 128, "attention_head_dim": 32,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    },
    "blt": {"encoder_hash_byte_group_vocab": 32},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "glm4v_moe": {"text_config": {"rope_parameters": {"mrope_section": [2, 1, 1]}}},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "full_attention"]}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 32},
    "mistral4": {"head_dim": 32},
    "musicgen": {"is_encoder_decoder": False},
    "nemotron": {"num_key_value_heads": 2, "start": {"num_key_value_heads": 8}},
    "qwen2_5_omni_thinker": {
        "vision_start_token_id": 60, "text_config": {"rope_parameters": {"mrope_section": [2, 3, 3]}},
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "step3p7": {"text_config": {"sliding_window": 16}},
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 48], "local_attn_chunk_length": 8,
    },
    "xlm": {"causal": True},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "zamba2": {
        "layer_types": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def shrunk(model_type: str) -> PreTrainedConfig:
    """The config of `model_type`, tiny."""
    kind = CONFIG_MAPPING[model_type]
    given = copy.deepcopy(EXCEPTIONS.get(model_type, {}))
    start = given.pop("start", {})
    settings = _small(kind(**start).to_dict())
    return kind(**_merged(settings, given))


def _merged(settings: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for key, value in given.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return {key: value for key, value in merged.items() if value is not None or key not in given}


def _small(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config and of those inside it, small."""
    depth = next((config[key] for key in config if DEPTHS.fullmatch(str(key)) and isinstance(config[key], int)), None)
    lists = {key: value for key, value in config.items() if isinstance(value, list) and value and len(value) == depth}
    kept = _kept({key: value for key, value in lists.items() if all(isinstance(item, str) for item in value)}, depth)
    barred = iter(range(VOCABULARY - 1, 3, -1))
    small: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("transformers_version", "architectures", "dtype", "torch_dtype"):
            continue
        if key == "per_layer_config" and isinstance(value, dict):
            layers = {new: value[str(old)] if str(old) in value else value.get(old) for new, old in enumerate(kept)}
            small[key] = {new: _small(layer) for new, layer in layers.items() if layer is not None}
            continue
        if isinstance(value, dict) and key not in ("id2label", "label2id", "rope_parameters", "rope_scaling"):
            small[key] = _small(value)
        elif key in lists:
            small[key] = [_of_field(str(key), value[index], barred) for index in kept]
        elif depth is not None and _are_layers(str(key), value, depth):
            small[key] = [item for item in value if item < len(kept)] or [len(kept) - 1]
        elif DEPTHS.fullmatch(str(key)) and type(value) is int:
            small[key] = len(kept)
        else:
            small[key] = _of_field(str(key), value, barred)
    if "num_attention_heads" in config and "num_key_value_heads" in config:
        is_latent = bool({"kv_lora_rank", "qk_nope_head_dim"} & small.keys())
        if is_latent or config["num_key_value_heads"] == config["num_attention_heads"]:
            small["num_key_value_heads"] = small["num_attention_heads"]
    for rope in (small.get("rope_parameters"), small.get("rope_scaling")):
        if isinstance(rope, dict) and "mrope_section" in rope:
            half = int(16 * rope.get("partial_rotary_factor", 1.0)) // 2
            rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    return small


def _are_layers(name: str, value: Any, depth: int) -> bool:
    """Whether these are indices of layers."""
    called_so = name.endswith(("layers", "ids", "idxs", "indexes", "indices"))
    return called_so and bool(value) and isinstance(value, list) and all(item in range(depth) for item in value)


def _kept(kinds: dict[str, list[str]], depth: int | None) -> list[int]:
    """One layer of each kind, at least two in all."""
    if depth is None:
        return [0, 1]
    columns = list(zip(*kinds.values(), strict=True)) or [()] * depth
    first = [columns.index(kind) for kind in dict.fromkeys(columns)]
    return first if len(first) > 1 else [first[0], min(first[0] + 1, depth - 1)]


def _of_field(name: str, value: Any, barred: Any) -> Any:
    if type(value) is not int and not (isinstance(value, list) and name == "eos_token_id"):
        return value
    for pattern, size in SIZES:
        if pattern.fullmatch(name):
            return size if not isinstance(value, int) or value > 0 or name.endswith("token_id") else value
    if re.fullmatch(r".*(token_id|token_index|_id|_index)", name) and value >= VOCABULARY:
        return next(barred)
    return value


def randomized(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """`model` in fp32 and evaluation mode, with weights so wide that outputs depend on every layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.15, generator=generator)
    return model.float().eval()
