"""Joining to transformers: which linears, loading and saving, source models."""

from .context import context_limit
from .described import load_tokenizer
from .discover import Discovery, LeftOut, LinearInfo, discover
from .head import HeadLayer, find_head
from .hf import BitstrataConfig, BitstrataQuantizer, attach
from .hub import resolve
from .load import OpenCheckpoint, open_checkpoint, pick_device
from .modules import bytes_per_token, input_device
from .source import SourceModel
from .tokens import (
    Stops,
    check_text,
    check_vocabulary,
    encode_body,
    encode_prompt,
    encode_turns,
    end_tokens,
    text_prefix,
    vocabulary_size,
)

__all__ = [
    "BitstrataConfig",
    "BitstrataQuantizer",
    "Discovery",
    "HeadLayer",
    "LeftOut",
    "LinearInfo",
    "OpenCheckpoint",
    "SourceModel",
    "Stops",
    "attach",
    "bytes_per_token",
    "check_text",
    "check_vocabulary",
    "context_limit",
    "discover",
    "encode_body",
    "encode_prompt",
    "encode_turns",
    "end_tokens",
    "find_head",
    "input_device",
    "load_tokenizer",
    "open_checkpoint",
    "pick_device",
    "resolve",
    "text_prefix",
    "vocabulary_size",
]
