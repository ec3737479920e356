"""Joining to transformers: which linears, loading and saving, source models."""

from .adapters import add_stored, check_peft, lora_on_planes
from .config import context_limit, steady_context
from .discover import Discovery, LeftOut, bytes_per_token, discover, input_device
from .head import HeadLayer, find_head
from .hf import BitstrataQuantizer, attach
from .hf_config import BitstrataConfig
from .hub import resolve
from .infilling import Infilling
from .kinds import LinearInfo
from .load import OpenCheckpoint, open_checkpoint, pick_device
from .publishing import Pushed, check_repo, push
from .rules import SamplingDefaults, score_rules
from .source import SourceModel, load_reference
from .speculation import DraftLength, Speculation, accept
from .tokens import (
    Stops,
    added_tokens,
    check_text,
    check_vocabulary,
    encode_body,
    encode_prompt,
    load_tokenizer,
    text_prefix,
    vocabulary_size,
)
from .turns import encode_turns, end_tokens, is_template_variable, template_knows, text_length

__all__ = [
    "BitstrataConfig",
    "BitstrataQuantizer",
    "Discovery",
    "DraftLength",
    "HeadLayer",
    "Infilling",
    "LeftOut",
    "LinearInfo",
    "OpenCheckpoint",
    "Pushed",
    "SamplingDefaults",
    "SourceModel",
    "Speculation",
    "Stops",
    "accept",
    "add_stored",
    "added_tokens",
    "attach",
    "bytes_per_token",
    "check_peft",
    "check_repo",
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
    "is_template_variable",
    "load_reference",
    "load_tokenizer",
    "lora_on_planes",
    "open_checkpoint",
    "pick_device",
    "push",
    "resolve",
    "score_rules",
    "steady_context",
    "template_knows",
    "text_length",
    "text_prefix",
    "vocabulary_size",
]
