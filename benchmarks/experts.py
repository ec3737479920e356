"""What experts cost: opening a large index, memory while quantizing, bytes and time of a decoding step.

    python benchmarks/experts.py open [--experts 128] [--layers 48]
    python benchmarks/experts.py memory [--experts 8,64] [--windows 16,64]
    python benchmarks/experts.py decode [--experts 64] [--bits 3]

open     a checkpoint of narrow layers: the size of its headers and of its index, and the time to open it, to describe
         it, and to load one plan's pages; beside it the number of tensors if each expert had its own
memory   one block of so many experts, quantized by `nested` with so many windows of 512 tokens: its peak above what the
         process had before, and what the job says it takes
decode   a mixture against a dense model of the same active width, token by token through the modules: bytes read and
         milliseconds, interleaved, medians

Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import torch
from common import random_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig, Qwen3MoeConfig

import bitstrata
from bitstrata.benchmark.random_model import random_model
from bitstrata.checkpoint import CheckpointReader
from bitstrata.memory import peak_memory
from bitstrata.models import bytes_per_token
from bitstrata.options import QuantizeOptions
from bitstrata.quantization.preflight import prepare
from bitstrata.quantization.settings import Settings
from bitstrata.quantization.stages import stages_of


def timed(call, times: int = 3) -> float:
    """Seconds, the median."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def measure_open(arguments: argparse.Namespace) -> dict[str, object]:
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, moe_intermediate_size=32, intermediate_size=64, head_dim=16,
        num_hidden_layers=arguments.layers, num_attention_heads=4, num_key_value_heads=2,
        num_experts=arguments.experts, num_experts_per_tok=8,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as workspace:
        folder = Path(arguments.folder or workspace)
        if not (folder / "config.json").exists():
            random_checkpoint(folder, config, (2, 3, 4), group_size=32)
        headers = 0
        for path in folder.glob("*.safetensors"):
            with open(path, "rb") as file:
                headers += int.from_bytes(file.read(8), "little")
        reader = CheckpointReader(folder)
        linears, stored = len(reader.spec.linears), len(reader.weight_map)
        apart = sum(len(reader.spec.layer_tensors(name)) + 1 for name in reader.spec.linears)
        return {
            "linears": linears,
            "tensors": stored,
            "tensors_if_apart": apart + len(reader.common_names()) - len(reader.spec.layers),
            "header_bytes": headers,
            "index_bytes": (folder / "model.safetensors.index.json").stat().st_size,
            "config_bytes": (folder / "config.json").stat().st_size,
            "open_seconds": timed(lambda: CheckpointReader(folder)),
            "inspect_seconds": timed(lambda: bitstrata.inspect(folder)),
            "load_seconds": timed(lambda: bitstrata.load(folder), 1),
            "load_plan_seconds": timed(lambda: bitstrata.load(folder, plan=2), 1),
        }


def quantize_block(options: QuantizeOptions, queue) -> None:
    """In a process of its own, so that its peak is its own."""
    settings = Settings.parse(options)
    said = prepare(settings, stages_of(settings), weights=False).memory.main
    before = peak_memory()
    report = bitstrata.quantize(**options.__dict__)
    queue.put((said, report.peak_memory_bytes - before))


def measure_memory(arguments: argparse.Namespace) -> dict[str, object]:
    rows = []
    for experts, windows in itertools.product(
        *(map(int, of.split(",")) for of in (arguments.experts, arguments.windows))
    ):
        with tempfile.TemporaryDirectory() as workspace:
            config = MixtralConfig(
                vocab_size=4096, hidden_size=512, intermediate_size=512, num_hidden_layers=1, num_attention_heads=8,
                num_key_value_heads=2, num_local_experts=experts, num_experts_per_tok=2, bos_token_id=0, eos_token_id=0,
                sliding_window=None,
            )  # fmt: skip
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(workspace)
            AutoTokenizer.from_pretrained(arguments.tokenizer).save_pretrained(workspace)
            options = QuantizeOptions(
                workspace, f"{workspace}/out", bits="2-4", method="nested", group_size=64,
                calibration=arguments.calibration, num_samples=windows, seq_len=512,
                options={"iterations": "1", "sweeps": "0"},
            )  # fmt: skip
            context = get_context("spawn")
            queue = context.Queue()
            process = context.Process(target=quantize_block, args=(options, queue))
            process.start()
            said, peak = queue.get()
            process.join()
        rows.append({"experts": experts, "windows": windows, "said_bytes": said, "peak_bytes": peak})
    return {"blocks": rows}


@torch.inference_mode()
def steps(model: torch.nn.Module, bits: int, count: int) -> list[float]:
    """Milliseconds of decoding steps."""
    ids, cache, taken = torch.tensor([[1]]), None, []
    for _ in range(count):
        start = time.perf_counter()
        result = model(input_ids=ids, bits=bits, past_key_values=cache, use_cache=True)
        taken.append(1e3 * (time.perf_counter() - start))
        cache, ids = result.past_key_values, result.logits[:, -1:].argmax(-1)
    return taken


def measure_decode(arguments: argparse.Namespace) -> dict[str, object]:
    shared = {
        "vocab_size": 1024, "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": True,
    }  # fmt: skip
    experts, active, width = int(arguments.experts.split(",")[-1]), 8, 512
    mixture = random_model(
        Qwen3MoeConfig(
            **shared, num_experts=experts, num_experts_per_tok=active, moe_intermediate_size=width, intermediate_size=64
        ),
        (2, 3, 4), dtype=torch.float32,
    )  # fmt: skip
    dense = random_model(LlamaConfig(**shared, intermediate_size=active * width), (2, 3, 4), dtype=torch.float32)
    models, times = {"mixture": mixture, "dense": dense}, {"mixture": [], "dense": []}
    for model in models.values():
        steps(model, arguments.bits, 8)
    for _ in range(5):
        for name, model in models.items():
            times[name] += steps(model, arguments.bits, 24)
    held = sum(module.bytes_read(arguments.bits) for module in mixture.modules() if hasattr(module, "bits_state")
               and hasattr(module, "bytes_read"))  # fmt: skip
    rows = {
        name: {
            "bytes_read": bytes_per_token(model, arguments.bits),
            "ms": statistics.median(times[name]),
        }
        for name, model in models.items()
    }
    return {**rows, "bytes_held_by_mixture": held, "ratio_ms": rows["mixture"]["ms"] / rows["dense"]["ms"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("open", "memory", "decode"))
    parser.add_argument("--experts")
    parser.add_argument("--windows", default="16,64")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--folder", help="open: where the checkpoint is kept for the next run")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--tokenizer", help="memory: a folder with a tokenizer")
    parser.add_argument("--calibration", default="stdlib")
    arguments = parser.parse_args()
    defaults = {"open": "128", "memory": "8,64", "decode": "64"}
    arguments.experts = arguments.experts or defaults[arguments.what]
    if arguments.what == "open":
        arguments.experts = int(arguments.experts)
    measure = {"open": measure_open, "memory": measure_memory, "decode": measure_decode}[arguments.what]
    print(json.dumps({"what": arguments.what, **vars(arguments), **measure(arguments)}))


if __name__ == "__main__":
    main()
