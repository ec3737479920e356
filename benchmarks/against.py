"""This tree against another version of itself: layers, a whole model, and the Python time of a decoding step.

Both versions run in turns, the old one before and after the new one, so that what else the machine does meets both,
and the two old figures show how much that is. Ratios are old / new, above 1 where the new one is faster. The other
version is a folder with its own built extension (`git worktree add`, `pip install -e`).

    layers   `bitstrata bench --json` of both, in turns: the median of each row's time
    model    the same with --whole
    step     one token of a model with the 1B shape's 16 blocks but 64 columns wide, in one thread: nearly all Python

    python benchmarks/against.py OTHER [--rounds 5] [--model llama-3.2-1b] [--threads 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
STEPS = 64  # tokens of a round
NARROW = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
}


def environment(tree: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(tree / "src"), "HF_HUB_OFFLINE": "1"}


def bench(tree: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bitstrata.cli.main", "bench", "--json", *arguments]
    done = subprocess.run(command, env=environment(tree), capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def times(result: dict[str, Any]) -> dict[str, float]:
    """Seconds of everything that `bench` measured of our kernels, by name."""
    named = {
        f"{r['out_features']}x{r['in_features']} {r['name']} rows {r['rows']} {r['regime']}": r["time"]
        for r in result["linear"]
        if r["name"].endswith("bits")
    }
    named |= {r["name"]: 1 / r["tokens_per_second"] for r in result["models"] if r["name"].endswith("bits")}
    return named


def work(folder: str) -> None:
    """Answer lines `bits rows` with the median seconds of a step; runs in a process of the tree that is measured."""
    import torch
    from transformers import DynamicCache

    import bitstrata

    torch.set_num_threads(1)  # what is measured is Python: threads would only wait for each other
    model = bitstrata.load(folder, dtype=torch.bfloat16, device="cpu")
    print("ready", flush=True)
    for line in sys.stdin:
        first, rows = line.split()
        bits: Any = int(first) if first != "mixed" else torch.tensor([2, 3, 4, 2][: int(rows)])
        ids, cache = torch.zeros(int(rows), 1, dtype=torch.long), DynamicCache(config=model.config)
        spent = []
        with torch.no_grad(), bitstrata.use_bits(model, bits):
            for _ in range(STEPS):
                start = time.perf_counter()
                model(ids, past_key_values=cache, use_cache=True)
                spent.append(time.perf_counter() - start)
        print(statistics.median(spent), flush=True)


@contextmanager
def worker(tree: Path, folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, __file__, "--work", str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(tree), text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        yield process
        process.stdin.close()


def ask(process: subprocess.Popen[str], question: str) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(question + "\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def steps(trees: dict[str, Path], rounds: int) -> dict[str, dict[str, list[float]]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    measured: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        source, out = Path(place, "model"), Path(place, "out")
        LlamaForCausalLM(LlamaConfig(**NARROW)).save_pretrained(source)
        command = [sys.executable, "-m", "bitstrata.cli.main", "quantize", str(source), "-o", str(out)]
        command += ["--method", "rtn", "--bits", "2-4", "--group-size", "32"]
        subprocess.run(command, env=environment(trees["old"]), check=True, capture_output=True)
        with worker(trees["old"], out) as old, worker(trees["new"], out) as new:
            for _ in range(rounds):
                for question in ("4 1", "2 1", "4 4", "mixed 4"):
                    for name, process in (("old", old), ("new", new), ("again", old)):
                        measured.setdefault(f"step, {question}", {}).setdefault(name, []).append(ask(process, question))
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--only", choices=["layers", "model", "step"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return
    trees = {"old": arguments.other.resolve(), "new": HERE, "again": arguments.other.resolve()}
    threads = ("--threads", str(arguments.threads))
    calls = {
        "layers": ("--rows", arguments.rows, *threads),
        "model": ("--shapes", arguments.model, "--whole", "--head-bits", "6", "--rows", "1", *threads),
    }
    measured: dict[str, dict[str, list[float]]] = {}
    for what, call in calls.items():
        if arguments.only not in (None, what):
            continue
        for _ in range(arguments.rounds):
            for name, tree in trees.items():
                for row, value in times(bench(tree, *call)).items():
                    measured.setdefault(row, {}).setdefault(name, []).append(value)
    if arguments.only in (None, "step"):
        measured |= steps(trees, 2 * arguments.rounds)
    rows = []
    for what, both in measured.items():
        old, new = (1e3 * statistics.median(values) for values in ([*both["old"], *both["again"]], both["new"]))
        rounds = list(zip(both["old"], both["new"], both["again"], strict=True))
        ratio = statistics.median((before + after) / 2 / middle for before, middle, after in rounds)
        noise = statistics.median(before / after for before, _, after in rounds)
        rows.append({"what": what, "old ms": old, "new ms": new, "old / new": ratio, "old / old again": noise})
        print(
            f"{what:<44} old {old:8.4f}   new {new:8.4f} ms   old / new {ratio:.3f}   old / old {noise:.3f}", flush=True
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"rounds": arguments.rounds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
