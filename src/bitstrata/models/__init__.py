"""Joining to transformers: which linears, loading and saving, source models."""

from .discover import Discovery, LeftOut, LinearInfo, discover
from .head import HeadLayer, find_head
from .hf import BitstrataConfig, BitstrataQuantizer, attach
from .load import choose_bits, load, load_tokenizer, parse_target
from .modules import bytes_per_token
from .source import SourceModel, all_finite, context_limit, resolve

__all__ = [
    "BitstrataConfig",
    "BitstrataQuantizer",
    "Discovery",
    "HeadLayer",
    "LeftOut",
    "LinearInfo",
    "SourceModel",
    "all_finite",
    "attach",
    "bytes_per_token",
    "choose_bits",
    "context_limit",
    "discover",
    "find_head",
    "load",
    "load_tokenizer",
    "parse_target",
    "resolve",
]
