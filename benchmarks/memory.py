"""How much memory does quantizing a model take, next to the size of the model?

Makes a synthetic Llama of about `--gigabytes` in fp32 (one shard a block), then quantizes it in a
process of its own whose private memory the operating system limits to less than the model
(RLIMIT_DATA; it counts reserved pages too), and prints the process's peak resident memory as a
share of the model.

    python benchmarks/memory.py [--gigabytes 3] [--limit-gigabytes 2.4] [--method rtn] [--option steps=2]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from bitstrata.checkpoint import TensorEntry, write_json, write_safetensors

HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY = 2048, 5632, 512, 32000
BLOCK = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def make_model(folder: Path, gigabytes: float) -> int:
    """Write a random Llama of about `gigabytes` in fp32; returns its bytes."""
    folder.mkdir(parents=True)
    block_bytes = 4 * sum(rows * columns for rows, columns in BLOCK.values())
    blocks = max(1, round((gigabytes * 1e9 - 8 * VOCABULARY * HIDDEN) / block_bytes))
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    weight_map = {}

    def shard(name: str, tensors: dict[str, tuple[int, ...]]) -> None:
        def random(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02

        entries = [
            TensorEntry(key, torch.float32, shape, lambda shape=shape: random(shape)) for key, shape in tensors.items()
        ]
        write_safetensors(folder / name, entries)
        weight_map.update(dict.fromkeys(tensors, name))

    for index in range(blocks):
        prefix = f"model.layers.{index}."
        tensors: dict[str, tuple[int, ...]] = {f"{prefix}{name}.weight": shape for name, shape in BLOCK.items()}
        tensors |= {f"{prefix}{norm}.weight": (HIDDEN,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shard(f"model-{index:03d}.safetensors", tensors)
    head = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shard("model-head.safetensors", {**head, "model.norm.weight": (HIDDEN,)})
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})

    letters = {chr(code): code - 32 for code in range(32, 127)}
    tokenizer = Tokenizer(models.WordLevel({**letters, "<unk>": 100}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3)
    parser.add_argument("--limit-gigabytes", type=float, default=2.4)
    parser.add_argument("--peak-gigabytes", type=float, default=1.5, help="fail if the resident peak is above this")
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--option", action="append", default=[])
    parser.add_argument("--num-samples", type=int, default=8)
    arguments = parser.parse_args()
    limit = int(arguments.limit_gigabytes * 1e9)

    with tempfile.TemporaryDirectory() as workspace:
        root = Path(workspace)
        size = make_model(root / "model", arguments.gigabytes)
        (root / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
        command = [sys.executable, "-m", "bitstrata.cli.main", "quantize", str(root / "model"), "-o", str(root / "out")]
        command += ["--method", arguments.method, "--calibration", str(root / "text.txt"), "--json"]
        command += ["--num-samples", str(arguments.num_samples), "--seq-len", "128"]
        for option in arguments.option:
            command += ["--option", option]
        started = time.monotonic()
        run = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )
        seconds = time.monotonic() - started
        if run.returncode:
            sys.exit(f"quantize failed with exit code {run.returncode} under a limit of {limit / 1e9:.2f} GB")
        peak = json.loads(run.stdout)["peak_memory_bytes"]
    result = {
        "method": arguments.method,
        "model_bytes": size,
        "limit_bytes": limit,
        "peak_bytes": peak,
        "peak_over_model": round(peak / size, 3),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(result))
    if peak > arguments.peak_gigabytes * 1e9:
        sys.exit(f"peak memory {peak / 1e9:.2f} GB is above {arguments.peak_gigabytes:.2f} GB")


if __name__ == "__main__":
    main()
