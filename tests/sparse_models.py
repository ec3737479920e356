"""Models of the shapes of large ones, whose weights are holes in their files: they take no room on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from tiny_models import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

SIZES: dict[str, dict[str, Any]] = {
    "8B": {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    "70B": {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
}
SHARDS = 8


def sparse_llama(folder: Path, size: str) -> Path:
    """Llama 3.1 of that size in bf16, and the tokenizer of the tiny models."""
    config = LlamaConfig(
        vocab_size=128_256, num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
        dtype="bfloat16", architectures=["LlamaForCausalLM"], bos_token_id=0, eos_token_id=1, **SIZES[size],
    )  # fmt: skip
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with init_empty_weights():
        shapes = {name: list(value.shape) for name, value in LlamaForCausalLM(config).state_dict().items()}
    names, homes = list(shapes), {}
    for shard in range(SHARDS):
        file, position = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors", 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name in names[shard::SHARDS]:
            size_of = 2
            for extent in shapes[name]:
                size_of *= extent
            header[name] = {
                "dtype": "BF16", "shape": shapes[name], "data_offsets": [position, position + size_of],
            }  # fmt: skip
            position += size_of
            homes[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            handle.truncate(8 + len(text) + position)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    return folder
