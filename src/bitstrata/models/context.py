"""How many tokens a model was made for, from its config.

Rotary positions can be stretched past the length a model was trained at, and configs say so in two
ways: with `max_position_embeddings` as it was, to be multiplied by `factor` (how model cards tell
users to switch linear, dynamic or yarn scaling on), or with `max_position_embeddings` raised to the
stretched length (llama3, longrope, and what was trained on at that length).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

MULTIPLIED = ("linear", "dynamic", "yarn")  # rope types whose length is factor x the original one


def context_limit(config: PreTrainedConfig) -> int | None:
    """The longest sequence, in tokens, that a model of this config was made for; None if it does not say."""
    text = config.get_text_config(decoder=True)
    limit: int | None = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    rope = getattr(text, "rope_parameters", None)
    if limit is None or not isinstance(rope, Mapping):
        return limit
    # some models rotate by layer type; a layer type that is not stretched holds the others to its length
    nested = [part for part in rope.values() if isinstance(part, Mapping)]
    return min(_stretched(limit, part) for part in nested or [rope])


def _stretched(limit: int, rope: Mapping[str, Any]) -> int:
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings") or limit
    if rope.get("rope_type", rope.get("type")) not in MULTIPLIED:
        return limit
    if not isinstance(factor, (int, float)) or not isinstance(original, (int, float)):
        return limit
    length = factor * original
    return max(limit, int(length)) if math.isfinite(length) else limit
