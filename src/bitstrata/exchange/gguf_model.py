"""A model's config in the metadata of a GGUF file: which architectures are known, and what each says differently."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..errors import UsageError
from ..models.compat import rotary_frequencies
from .gguf_file import gguf_package


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp has an architecture of transformers.

    name: of gguf.MODEL_ARCH. turned: q and k have rotary pairs side by side there, half a head apart here.
    raised: the weights of its norms are stored with the 1 that the model adds.
    """

    name: str
    turned: bool = False
    raised: bool = False


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture("LLAMA", turned=True),
        "mistral": Architecture("LLAMA", turned=True),
        "qwen2": Architecture("QWEN2"),
        "qwen3": Architecture("QWEN3"),
        "gemma2": Architecture("GEMMA2", raised=True),
        "gemma3_text": Architecture("GEMMA3", raised=True),
        "phi3": Architecture("PHI3"),
    }
)
GEMMA2_27B = (46, 144)  # blocks, and query_pre_attn_scalar: the one that llama.cpp scales by width / heads


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Raises UsageError, naming it, for one that is not known here."""
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise UsageError(
            f"GGUF export does not know the architecture {config.model_type!r}",
            hint=f"it knows {', '.join(ARCHITECTURES)}; --format dense knows all",
        )
    return found


def head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def turned_rows(name: str, config: PreTrainedConfig) -> Tensor | None:
    """For q_proj and k_proj, the rows in the order of GGUF: int64 [N]; None for other layers."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.rpartition(".")[2])
    if heads is None:
        return None
    width = head_dim(config)
    return torch.arange(heads * width).view(heads, 2, width // 2).transpose(1, 2).reshape(-1)


def add_metadata(writer: Any, config: PreTrainedConfig, name: str) -> dict[str, Tensor]:
    """Put what `config` says into `writer`; tensors that it asks for beside the model's.

    Raises UsageError for what llama.cpp would compute otherwise.
    """
    writer.add_type("model")
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_vocab_size(config.vocab_size)
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    usual = "gelu_pytorch_tanh" if config.model_type.startswith("gemma") else "silu"
    if activation not in (usual, None):
        raise UsageError(f"llama.cpp computes {usual} in {config.model_type}, not {activation}", hint="nothing to do")
    if (own := _OWN.get(config.model_type)) is not None:
        own(writer, config)
    return _add_rotary(writer, config)


def _add_gemma2(writer: Any, config: PreTrainedConfig) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)
    scaled_by = config.query_pre_attn_scalar
    if scaled_by != head_dim(config) and (config.num_hidden_layers, scaled_by) != GEMMA2_27B:
        raise UsageError(f"llama.cpp does not scale queries by {scaled_by}", hint="nothing to do")


def _add_gemma3(writer: Any, config: PreTrainedConfig) -> None:
    writer.add_sliding_window(config.sliding_window)
    pattern = [kind == "sliding_attention" for kind in config.layer_types]
    if pattern != [bool((layer + 1) % 6) for layer in range(len(pattern))]:
        raise UsageError("llama.cpp has every sixth layer of Gemma 3 without a window", hint="nothing to do")
    if config.query_pre_attn_scalar != head_dim(config) and config.num_hidden_layers != 62:
        raise UsageError("llama.cpp does not scale these queries", hint="nothing to do")
    if getattr(config, "final_logit_softcapping", None) or getattr(config, "attn_logit_softcapping", None):
        raise UsageError("llama.cpp does not cap the logits of Gemma 3", hint="nothing to do")


def _add_phi3(writer: Any, config: PreTrainedConfig) -> None:
    writer.add_sliding_window(config.sliding_window or 0)


_OWN: Mapping[str, Callable[[Any, PreTrainedConfig], None]] = MappingProxyType(
    {"gemma2": _add_gemma2, "gemma3_text": _add_gemma3, "phi3": _add_phi3}
)


def _add_rotary(writer: Any, config: PreTrainedConfig) -> dict[str, Tensor]:
    """Rotary positions; for those of Llama 3 also a factor a frequency, as the tensor rope_freqs."""
    rope = config.rope_parameters
    if "full_attention" in rope:
        local = rope["sliding_attention"]
        if local["rope_type"] != "default":
            raise UsageError("llama.cpp stretches no positions in a window", hint="nothing to do")
        writer.add_rope_freq_base_swa(local["rope_theta"])
        rope = rope["full_attention"]
    share = rope.get("partial_rotary_factor", 1.0)
    rotated = int(head_dim(config) * share)
    writer.add_rope_dimension_count(rotated)
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    types = gguf_package().RopeScalingType
    if kind == "default":
        return {}
    if kind == "linear":
        writer.add_rope_scaling_type(types.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
        return {}
    if kind == "yarn":
        writer.add_rope_scaling_type(types.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        return {}
    if kind == "llama3":
        return {"rope_freqs.weight": rope_factors(config)}
    raise UsageError(f"GGUF export does not know positions of type {kind!r}", hint="--format dense knows all")


def rope_factors(config: PreTrainedConfig) -> Tensor:
    """By how much each frequency of rotary positions is lowered: fp32 [rotated / 2]."""
    rope = config.rope_parameters
    stretched = rotary_frequencies(config, rope["rope_type"]).double()
    rotated = 2 * len(stretched)
    plain = rope["rope_theta"] ** -(torch.arange(0, rotated, 2).double() / rotated)
    factors: Tensor = (plain / stretched).float()
    return factors
