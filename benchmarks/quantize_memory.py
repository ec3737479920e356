"""How much memory quantizing a few blocks of a large model takes, and how long: a limit is set by the system.

    python benchmarks/quantize_memory.py [--shape llama-3.1-8b] [--blocks 2] [--bits 2-4] [--num-samples 128]
        [--seq-len 2048] [--checked 8] [--limit-gigabytes 4] [--method nested] [--folder FOLDER] [-o FILE]

Makes a random model of that shape in bf16 (`--set` changes its sizes, such as `--set intermediate_size=4096`), with as
many blocks, and quantizes it by the public command in a process of its own. Of that the system limits the private
memory (RLIMIT_DATA, which counts what is reserved, so more than what is resident): what goes beyond it fails. Prints,
and saves, the peak of resident memory (ru_maxrss, which also counts pages of the model's files that were mapped), and
seconds of each block and their split (quantize_speed.py).
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from quantize_speed import Clock, watched
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from bitstrata.benchmark.machine import describe
from bitstrata.benchmark.random_model import ROPE, SHAPES, skeleton
from bitstrata.checkpoint import TensorEntry, write_json, write_safetensors

WITHOUT_END = 1 << 30  # blocks that are timed


def make_model(folder: Path, sizes: dict[str, int | bool], seed: int) -> int:
    """Write a random Llama in bf16, one shard a block, with a tokenizer of letters; returns its bytes."""
    folder.mkdir(parents=True)
    own = {"max_position_embeddings": 8192, "rope_parameters": ROPE, "dtype": "bfloat16"}
    config = LlamaConfig(architectures=["LlamaForCausalLM"], **own, **sizes)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in skeleton(config, None, torch.bfloat16, "cpu").named_parameters():
        block = name.split(".")[2] if ".layers." in name else "outside"
        shards.setdefault(f"model-{block}.safetensors", {})[name] = parameter.shape

    def made(shape: torch.Size) -> torch.Tensor:
        values = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        return values.bfloat16()

    for file, tensors in shards.items():
        entries = [
            TensorEntry(name, torch.bfloat16, tuple(shape), lambda shape=shape: made(shape))  # type: ignore[misc]
            for name, shape in tensors.items()
        ]
        write_safetensors(folder / file, entries)
    files = {name: file for file, tensors in shards.items() for name in tensors}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})
    letters = {chr(code): code - 32 for code in range(32, 127)}
    tokenizer = Tokenizer(models.WordLevel({**letters, "<unk>": 95}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measured(arguments: list[str], method: str, checked: int) -> None:
    """The public command in this process, and then its measures on a line of stderr."""
    from bitstrata.cli.main import run
    from bitstrata.quantization import preflight

    preflight.FEWEST_WINDOWS = checked
    clock = Clock(WITHOUT_END)
    with watched(clock, method):
        code = run(["quantize", *arguments])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("\n" + json.dumps({"peak_resident_bytes": peak, "blocks": clock.rows}), file=sys.stderr)
    sys.exit(code)


def main() -> None:
    if sys.argv[1:2] == ["--measured"]:
        measured(sys.argv[4:], sys.argv[2], int(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another size of the shape")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--bits", default="2-4")
    parser.add_argument("--method", default="nested")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--checked", type=int, default=8, help="held-out windows; the usual are at least 8")
    parser.add_argument("--limit-gigabytes", type=float, default=4)
    parser.add_argument("--folder", type=Path, help="where model and result lie meanwhile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    sizes = {**SHAPES[args.shape], "num_hidden_layers": args.blocks}
    sizes |= {name: json.loads(value) for name, value in (item.split("=", 1) for item in args.set)}
    limit = int(args.limit_gigabytes * 1e9)
    with tempfile.TemporaryDirectory(dir=args.folder) as workspace:
        root = Path(workspace)
        size = make_model(root / "model", sizes, args.seed)
        letters = random.Random(args.seed)
        count = (args.num_samples + 17) * args.seq_len  # held-out windows too
        (root / "text.txt").write_text("".join(letters.choices("etaoin shrdlu", k=count)))
        command = [sys.executable, __file__, "--measured", args.method, str(args.checked)]
        command += [
            str(root / "model"),
            "-o",
            str(root / "out"),
            "--method",
            args.method,
            "--bits",
            args.bits,
            "--calibration",
            str(root / "text.txt"),
            "--json",
        ]
        command += ["--num-samples", str(args.num_samples), "--seq-len", str(args.seq_len), "--device", "cpu"]
        started = time.monotonic()
        run = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )
        seconds = time.monotonic() - started
    *messages, last = run.stderr.strip().split("\n")
    print("\n".join(messages), file=sys.stderr)
    if run.returncode:
        sys.exit(f"quantize failed with exit code {run.returncode} under a limit of {limit / 1e9:.2f} GB: {last}")
    result = {
        "machine": describe(torch.get_num_threads()),
        "shape": sizes,
        "model_bytes": size,
        "method": args.method,
        "bits": args.bits,
        "num_samples": args.num_samples,
        "seq_len": args.seq_len,
        "checked_windows": args.checked,
        "limit": "RLIMIT_DATA",
        "limit_bytes": limit,
        **json.loads(last),
        "seconds": seconds,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
