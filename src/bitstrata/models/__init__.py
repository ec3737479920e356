"""Joining to transformers: which linears, loading and saving, source models."""

from .described import load_tokenizer
from .discover import Discovery, LeftOut, LinearInfo, discover
from .fit import fit_budget
from .head import HeadLayer, find_head
from .hf import BitstrataConfig, BitstrataQuantizer, attach
from .load import choose_bits, load, parse_target
from .modules import bytes_per_token
from .plans import bits_name, highest_bits, parse_bits_or_plan, parse_bits_or_plans
from .resize import Resized, resize
from .source import SourceModel, all_finite, context_limit, resolve

__all__ = [
    "BitstrataConfig",
    "BitstrataQuantizer",
    "Discovery",
    "HeadLayer",
    "LeftOut",
    "LinearInfo",
    "Resized",
    "SourceModel",
    "all_finite",
    "attach",
    "bits_name",
    "bytes_per_token",
    "choose_bits",
    "context_limit",
    "discover",
    "find_head",
    "fit_budget",
    "highest_bits",
    "load",
    "load_tokenizer",
    "parse_bits_or_plan",
    "parse_bits_or_plans",
    "parse_target",
    "resize",
    "resolve",
]
