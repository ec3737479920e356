"""Tiny random models of architectures that other engines know, with a byte-level tokenizer that they know too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from bitstrata.exchange.gguf_file import pre_tokenizer_of

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
TEXT = "The quick brown fox isn't as lazy as 1234 dogs.\n\n  It'll jump over them, won't it? x = f(y[12]) + 3;\n"
_SHARED: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
# name -> model type, its own settings, and the pre-tokenizer; llama and gemma: the tokenizer is one of pieces
KNOWN: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {"tie_word_embeddings": True}, "smollm"),
    "llama-wide": ("llama", {"hidden_size": 256, "intermediate_size": 512}, "gpt-2"),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "attention_bias": True}, "llama-bpe"),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        "gpt-2",
    ),
    "mistral": ("mistral", {"head_dim": 32, "sliding_window": None}, "llama"),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, "qwen2"),
    "qwen3": ("qwen3", {"head_dim": 32}, "qwen2"),
    "gemma2": ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64}, "gemma"),
    "gemma3": ("gemma3_text", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64}, "gpt-2"),
    "phi3": ("phi3", {"original_max_position_embeddings": 128, "sliding_window": None}, "gpt-2"),
}


def tokenizer_of(pre: str, *, bos: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE of some 300 tokens; with `bos`, it puts one in front of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer_of(pre)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT, "the the dog dogs jumps over lazy", TEXT.upper()] * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    return _named(tokenizer)


def pieces(*, prefix: bool) -> PreTrainedTokenizerFast:
    """BPE as SentencePiece has it: spaces are part of the pieces, what is in none falls back to bytes.

    prefix: it puts a space before a text, as Llama 2 does and Gemma does not.
    """
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    trained.train_from_iterator([TEXT.replace(" ", space), f"the{space}lazy{space}dogs"] * 3, trainer)
    described = json.loads(trained.to_str())["model"]
    ranked = sorted(described["vocab"], key=described["vocab"].__getitem__)
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *(one for one in ranked if one not in SPECIAL)]
    merges = [tuple(merge) for merge in described["merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<|end|>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", space)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), replace]) if prefix else replace
    steps = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    return _named(tokenizer)


def _named(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|end|>",
        chat_template=TEMPLATE,
    )


def save_known(name: str, folder: Path, *, seed: int = 0) -> PreTrainedModel:
    """Build model `name` of KNOWN, save it with its tokenizer to `folder`, and return it: fp32."""
    model_type, own, pre = KNOWN[name]
    is_pieces = pre in ("llama", "gemma")
    tokenizer = pieces(prefix=pre == "llama") if is_pieces else tokenizer_of(pre, bos=name == "llama3")
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**_SHARED, "vocab_size": len(tokenizer) + 3, **own})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for key, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.12)
        elif "norm" in key or "bias" in key:  # so that their place matters
            torch.nn.init.normal_(parameter, mean=parameter.detach().flatten()[0].item(), std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
