"""Joining to transformers: which linears, loading and saving, source models."""

from .config import context_limit
from .discover import Discovery, LeftOut, LinearInfo, bytes_per_token, discover, input_device
from .fit import fit_budget
from .head import HeadLayer, find_head
from .hf import BitstrataConfig, BitstrataQuantizer, attach
from .hub import resolve
from .load import choose_bits, load, parse_target
from .plans import bits_name, highest_bits, parse_bits_or_plan, parse_bits_or_plans
from .resize import Resized, resize
from .source import SourceModel, all_finite, load_reference
from .tokens import (
    Stops,
    check_text,
    check_vocabulary,
    encode_body,
    encode_prompt,
    encode_turns,
    end_tokens,
    load_tokenizer,
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
    "Resized",
    "SourceModel",
    "Stops",
    "all_finite",
    "attach",
    "bits_name",
    "bytes_per_token",
    "check_text",
    "check_vocabulary",
    "choose_bits",
    "context_limit",
    "discover",
    "encode_body",
    "encode_prompt",
    "encode_turns",
    "end_tokens",
    "find_head",
    "fit_budget",
    "highest_bits",
    "input_device",
    "load",
    "load_reference",
    "load_tokenizer",
    "parse_bits_or_plan",
    "parse_bits_or_plans",
    "parse_target",
    "resize",
    "resolve",
    "text_prefix",
    "vocabulary_size",
]
