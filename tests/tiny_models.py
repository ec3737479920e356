"""Tiny random models with a working tokenizer, and texts for them; nothing is downloaded."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIAL = ("<s>", "</s>", "<unk>")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n.,;:!?'\"()[]{}<>+-*/=_#|"
VOCABULARY = (*SPECIAL, *CHARACTERS)[:64]


def tiny_tokenizer(prefix: str = "<s>", suffix: str = "") -> PreTrainedTokenizerFast:
    """One token a character, with BOS, EOS and an unknown token; 64 entries.

    prefix, suffix: special tokens that it puts around a text, separated by spaces; BOS in front by default.
    """
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(VOCABULARY)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{prefix} $A {suffix}".split(), special_tokens=[(token, VOCABULARY.index(token)) for token in SPECIAL]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def save(model: PreTrainedModel, folder: Path) -> Path:
    """Write `model` and the tiny tokenizer to `folder`, and return the folder."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_llama(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """A random Llama, fp32: 2 layers, hidden 64, 4 heads over 2 key-value heads, 64 tokens, context 64.

    Its weights are wide enough that the next token is far from a coin toss.
    """
    settings: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    return save(LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})), folder)


def tiny_mixtral(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """A random Mixtral, fp32: 2 layers, hidden 64, 4 experts, two a token."""
    settings: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "sliding_window": None,
    }
    torch.manual_seed(seed)
    return save(MixtralForCausalLM(MixtralConfig(**{**settings, **overrides})), folder)


def tiny_gpt2(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """A random GPT-2, fp32, whose linears are transposed (Conv1D) and whose head is tied."""
    settings: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(seed)
    return save(GPT2LMHeadModel(GPT2Config(**{**settings, **overrides})), folder)


def tiny_text(path: Path, *, seed: int = 0, documents: int = 4, words: int = 200) -> Path:
    """Write a text of made-up words that the tiny tokenizer knows; returns the path."""
    draw = random.Random(seed)
    lexicon = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 7))) for _ in range(60)]
    texts = [" ".join(draw.choices(lexicon, k=words)) + "." for _ in range(documents)]
    path.write_text("<|endoftext|>".join(texts), encoding="utf-8")
    return path
