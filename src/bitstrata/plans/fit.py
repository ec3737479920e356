"""The largest budget that the free memory leaves.

    budget = free - cache - reserve

    free      what the process may still take: of the system and of its control groups, or of the GPU
    cache     keys and values of `context` tokens: 2 x layers x key-value heads x what a head takes in their dtype or in
              codes; layers that look at a window only need less, so this is the most it can be
    reserve   RESERVE, for activations, the temporaries of long prompts, and whatever else the process does

The budget is for the whole model, unquantized tensors included, as `bitstrata plan` counts it.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from ..errors import ResourceError, UsageError
from ..kernels.cached import head_bytes
from ..memory import free_memory
from ..models import context_limit
from ..progress import note
from .budget import Budget, ModelSizes, bytes_text

RESERVE = 256 << 20
FIT = "fit"  # what the budget and its plan are called: bytes would be others at each start


def cache_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype, kv_cache_dtype: str = "auto") -> int:
    """Bytes of the keys and values of `tokens` tokens, in `dtype` or, if kv_cache_dtype is not "auto", in that."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * tokens * head_bytes(width, kv_cache_dtype, dtype))


def fit_budget(
    sizes: ModelSizes,
    config: PreTrainedConfig,
    device: torch.device | str = "cpu",
    context: int | None = None,
    dtype: torch.dtype | None = None,
    *,
    kv_cache_dtype: str = "auto",
    reserve: int = RESERVE,
) -> Budget:
    """See the head of this file. Call it before the model is loaded: what is free then is what it may take.

    Args:
        context: tokens whose keys and values must fit as well; the model's context by default.
        dtype: of keys and values; the config's by default.
        kv_cache_dtype: how they are kept: auto, in `dtype`; int8 or int4.

    Raises:
        UsageError: a context below 1, or none given for a model that has none; a kv_cache_dtype that there is none of.
        ResourceError: the smallest plan does not fit.
    """
    tokens = context if context is not None else context_limit(config)
    if tokens is None:
        raise UsageError("this model's config states no context", hint="say for how many tokens to leave room")
    if tokens < 1:
        raise UsageError(f"context={tokens} must be at least 1")
    free = free_memory(device)
    own = getattr(torch, config.dtype) if isinstance(config.dtype, str) else config.dtype
    cache = cache_bytes(config, tokens, dtype or own or torch.float32, kv_cache_dtype)
    room, least = free - cache - reserve, sizes.of_plan(sizes.smallest).total
    if room < least:
        raise ResourceError(
            f"the smallest this model can be is {bytes_text(least)}; the {bytes_text(free)} free on {device} leave "
            f"{bytes_text(max(0, room))} beside the cache of {tokens} tokens ({bytes_text(cache)}) and a reserve of "
            f"{bytes_text(reserve)}",
            hint="leave room for fewer tokens (context), or end other programs",
        )
    note(
        f"{bytes_text(room)} are free for the model: {bytes_text(free)} on {device} without the cache of {tokens} "
        f"tokens ({bytes_text(cache)}) and a reserve of {bytes_text(reserve)}"
    )
    return Budget(room, "bytes", FIT)
