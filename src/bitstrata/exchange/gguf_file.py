"""The gguf package, which is optional, and what both directions know of GGUF: its names for tokenizers."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..errors import UsageError

# What comes before byte-pair merges, as tokenizers has it. These regular expressions are part of the models.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
PRETOKENIZERS: Mapping[str, tuple[tuple[Any, ...], ...]] = MappingProxyType(
    {
        "gpt-2": (("ByteLevel", True),),
        "smollm": (("Digits", True), ("ByteLevel", True)),
        "llama-bpe": (("Split", _LLAMA3, "Isolated", False), ("ByteLevel", False)),
        "qwen2": (("Split", _QWEN2, "Isolated", False), ("ByteLevel", False)),
    }
)


def gguf_package() -> Any:
    """The gguf package. Raises UsageError if it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise UsageError(
            "GGUF files need the gguf package", hint="pip install 'bitstrata[gguf]', or pip install gguf"
        ) from None


def steps_of(pre_tokenizer: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], ...]:
    """The pre-tokenizer of a tokenizer.json in the form of PRETOKENIZERS."""
    if pre_tokenizer is None:
        return ()
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in steps_of(part))
    if kind == "ByteLevel" and not pre_tokenizer["add_prefix_space"]:
        return (("ByteLevel", pre_tokenizer["use_regex"]),)
    if kind == "Digits":
        return (("Digits", pre_tokenizer["individual_digits"]),)
    if kind == "Split" and "Regex" in pre_tokenizer["pattern"]:
        return (("Split", pre_tokenizer["pattern"]["Regex"], pre_tokenizer["behavior"], pre_tokenizer["invert"]),)
    return ((kind,),)


def pre_tokenizer_of(name: str) -> Any:
    """The pre-tokenizer that GGUF calls `name`, as one of tokenizers. Raises KeyError for a name not known here."""
    from tokenizers import Regex, pre_tokenizers

    made: dict[str, Any] = {
        "ByteLevel": lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex),
        "Digits": lambda single: pre_tokenizers.Digits(individual_digits=single),
        "Split": lambda regex, behaviour, invert: pre_tokenizers.Split(Regex(regex), behaviour.lower(), invert),
    }
    steps = [made[kind](*rest) for kind, *rest in PRETOKENIZERS[name]]
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
