"""A tokenizer in the metadata of a GGUF file, so that llama.cpp gives the tokens that it gives."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import UsageError
from ..models import load_tokenizer, vocabulary_size
from ..models.tokens import added_tokens, around
from .gguf_file import PRETOKENIZERS, gguf_package, steps_of

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # stands for a space in pieces of SentencePiece


def add_tokenizer(writer: Any, folder: Path, config: PreTrainedConfig) -> None:
    """Put the tokenizer and the chat template of the model in `folder` into `writer`.

    Raises UsageError for a tokenizer that llama.cpp has no name for.
    """
    tokenizer = load_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = json.loads(backend.to_str()) if backend is not None else {}
    model = described.get("model", {})
    if model.get("type") != "BPE":
        raise _unknown(folder, f"a tokenizer of type {model.get('type', type(tokenizer).__name__)}")
    if model.get("byte_fallback"):
        _add_pieces(writer, tokenizer, described, config)
    else:
        steps = steps_of(described["pre_tokenizer"])
        names = [name for name, known in PRETOKENIZERS.items() if known == steps]
        if not names:
            raise _unknown(folder, f"a tokenizer that splits a text by {steps}")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(names[0])
        _add_list(writer, tokenizer, config, lambda text: text)
    _add_special(writer, folder, tokenizer, merges=not model.get("byte_fallback"))


def _unknown(folder: Path, what: str) -> UsageError:
    known = ", ".join(PRETOKENIZERS)
    return UsageError(
        f"{folder} has {what}, for which no name in GGUF is known here",
        hint=f"known are byte-level BPE split as in {known}, and SentencePiece BPE",
    )


def _add_pieces(
    writer: Any, tokenizer: PreTrainedTokenizerBase, described: Mapping[str, Any], config: PreTrainedConfig
) -> None:
    """SentencePiece: llama.cpp merges the pair whose piece has the highest score, here the one merged first."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in described["model"]["merges"]]
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(merges):
        rank.setdefault(left + right, index)
    tokens = _add_list(writer, tokenizer, config, lambda text: text.replace(SPACE, " "))
    writer.add_token_scores([-float(rank.get(token, len(merges) + index)) for index, token in enumerate(tokens)])
    text = json.dumps([described.get("normalizer"), described.get("pre_tokenizer")])
    writer.add_add_space_prefix('"Prepend"' in text or '"prepend_scheme": "first"' in text or '"always"' in text)


def _add_list(writer: Any, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, plain: Any) -> list[str]:
    """All tokens and their kinds, and for rows of the embedding without a token a name; `plain`: of an added one."""
    kinds = gguf_package().TokenType
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    added = added_tokens(tokenizer)
    unknown = getattr(tokenizer, "unk_token_id", None)
    tokens, types = [], []
    for index in range(max(vocabulary_size(config), 1 + max(vocabulary))):
        token = vocabulary.get(index)
        if token is None:
            tokens.append(f"[PAD{index}]")
            types.append(kinds.UNUSED)
        elif index in added:
            is_control = added[index].special
            tokens.append(added[index].content if is_control else plain(added[index].content))
            types.append(
                kinds.UNKNOWN
                if index == unknown and not is_control
                else kinds.CONTROL
                if is_control
                else kinds.USER_DEFINED
            )
        else:
            tokens.append(token)
            types.append(kinds.BYTE if _BYTE.fullmatch(token) else kinds.NORMAL)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    return tokens


def _add_special(writer: Any, folder: Path, tokenizer: PreTrainedTokenizerBase, *, merges: bool) -> None:
    """Merges, the special tokens, what stands around a text, and the chat template."""
    found = gguf_package().SpecialVocab(folder, load_merges=merges)
    if not merges:
        found.merges = []
    before, behind = around(tokenizer)
    own = {"bos": getattr(tokenizer, "bos_token_id", None), "eos": getattr(tokenizer, "eos_token_id", None)}
    if before not in ([], [own["bos"]]) or behind not in ([], [own["eos"]]):
        raise UsageError(
            f"the tokenizer of {folder} puts {before} before a text and {behind} behind it, "
            "GGUF knows BOS and EOS only",
            hint="change what the tokenizer adds, or use another format",
        )
    found.add_special_token = {"bos": bool(before), "eos": bool(behind)}
    found.special_token_ids |= {name: index for name, index in own.items() if index is not None}
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    found.chat_template = template
    found.add_to_gguf(writer, quiet=True)
