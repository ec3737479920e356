"""How long does resizing a running model take, what does it read, and is its memory what the plan says?

Makes a checkpoint of about `--gigabytes` at its largest (Llama-3.2-1B's layers with random planes for 2 to 8 bits, a
vocabulary of 32,000, which stays unquantized) and a page order with the layers' steps shuffled, then, in a process of
its own so that nothing else moves its memory:

    load     at each budget: seconds, bytes read, and the growth of the process's memory beside the plan's figure
    jumps    resizes between these budgets, in random order: the same
    steps    resizes by one page of the order, up and down: seconds (median, 95th percentile), bytes read per byte added
    pass     a forward pass of one token at 4 bits: the model of pages beside one that was loaded whole, interleaved

Memory is what Linux counts as resident (/proc/self/smaps_rollup): anonymous memory holds the planned layers, mapped
files the unquantized tensors as far as they are touched. Bytes read are those that the process asked the system for
(rchar of /proc/self/io), beside what the pages weigh. The files are in the system's cache when they are read.

    python benchmarks/resize.py [--gigabytes 1] [--steps 200] [--threads 1] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import random_checkpoint
from transformers import LlamaConfig, PreTrainedModel

import bitstrata
from bitstrata.benchmark.machine import describe
from bitstrata.benchmark.random_model import SHAPES
from bitstrata.checkpoint import CheckpointReader, Fingerprint
from bitstrata.plans import PAGES_FILE, ModelSizes, Page, PageOrder, Plan

BITS = (2, 3, 4, 5, 6, 7, 8)
SHAPE = {**SHAPES["llama-3.2-1b"], "vocab_size": 32000, "tie_word_embeddings": False}
BUDGETS = 5  # between the smallest and the largest plan, both included
SEED = 0


def make(folder: Path, gigabytes: float) -> None:
    """The checkpoint and its page order."""
    sizes = {}
    for blocks in (1, 2):  # bytes are linear in the number of blocks
        probe = LlamaConfig(**{**SHAPE, "num_hidden_layers": blocks}, max_position_embeddings=2048)
        sizes[blocks] = _largest_bytes(probe)
    blocks = max(1, round((gigabytes * 1e9 - sizes[1]) / (sizes[2] - sizes[1])) + 1)
    config = LlamaConfig(**{**SHAPE, "num_hidden_layers": blocks}, max_position_embeddings=2048)
    random_checkpoint(folder, config, BITS)
    write_order(folder)


def _largest_bytes(config: LlamaConfig) -> int:
    hidden, wide, groups = config.hidden_size, config.intermediate_size, 128
    narrow = config.num_key_value_heads * config.head_dim
    weights = config.num_hidden_layers * (2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * wide)
    return int(weights * (1 + 2 * (BITS[-1] + 1) / groups) + 4 * config.vocab_size * hidden)


def write_order(folder: Path) -> None:
    reader = CheckpointReader(folder)
    sizes, draw = ModelSizes.of(reader), random.Random(SEED)
    steps = [name for name in sizes.layers for _ in BITS[1:]]
    draw.shuffle(steps)
    current, pages = dict(sizes.smallest), []
    for name in steps:
        low, high, held = current[name], current[name] + 1, sizes.layers[name]
        pages.append(Page(layers=[name], from_bits=low, to_bits=high, bytes=held[high] - held[low], saving=0.0))
        current[name] = high
    PageOrder(pages, Fingerprint.of(reader)).save(folder / PAGES_FILE)


def memory() -> dict[str, int]:
    """Resident bytes of this process: anonymous, and of mapped files."""
    gc.collect()
    text = Path("/proc/self/smaps_rollup").read_text()
    found = {key: 1024 * int(re.search(rf"^{key}:\s+(\d+)", text, re.MULTILINE)[1]) for key in ("Rss", "Anonymous")}
    return {"anonymous": found["Anonymous"], "files": found["Rss"] - found["Anonymous"]}


def asked() -> int:
    """Bytes that this process has asked the system to read so far."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def row(budget: str, plan: Plan, folder: Path, before: dict[str, int], seconds: float, read: int) -> dict[str, Any]:
    size, now = ModelSizes.of(CheckpointReader(folder, paged=True)).of_plan(plan), memory()
    grown = now["anonymous"] - before["anonymous"]
    return {
        "budget": budget,
        "plan_weights": size.weights,
        "plan_total": size.total,
        "anonymous": grown,
        "files": now["files"] - before["files"],
        "off_percent": round(100 * (grown / size.weights - 1), 3),
        "seconds": round(seconds, 4),
        "read": read,
    }


def forward(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model(torch.arange(4)[None])


def loads(folder: Path, budgets: list[str]) -> dict[str, Any]:
    """One budget a process; this is that process."""
    forward(bitstrata.load(folder, budget=budgets[0]))  # imports, and what the libraries keep
    before, started, first = memory(), time.perf_counter(), asked()
    model = bitstrata.load(folder, budget=budgets[-1])
    seconds, read = time.perf_counter() - started, asked() - first
    return row(budgets[-1], Plan(model.pages.plan(budgets[-1])), folder, before, seconds, read)


def resizes(folder: Path, budgets: list[str], steps: int) -> dict[str, Any]:
    draw = random.Random(SEED)
    model = bitstrata.load(folder, budget=budgets[0])
    forward(model)
    start = memory()
    pages = model.pages
    least = pages.sizes.of_plan(pages.plan(budgets[0])).weights
    start["anonymous"] -= least
    jumps = []
    for budget in [*draw.sample(budgets, len(budgets)), *draw.sample(budgets, len(budgets))]:
        plan, first = model.pages.plan(budget), asked()
        done = model.resize(plan)
        entry = row(budget, plan, folder, start, done.seconds, asked() - first)
        jumps.append(entry | {"added": done.added, "dropped": done.dropped, "pages_read": done.read})
        forward(model)

    order = PageOrder.load(folder / PAGES_FILE)
    current = dict(model.pages.plan(budgets[0]))
    model.resize(current)
    at, taken = 0, []
    for _ in range(steps):
        up = at == 0 or (at < len(order.pages) and draw.random() < 0.7)
        page = order.pages[at if up else at - 1]
        at += 1 if up else -1
        current.update(dict.fromkeys(page.layers, page.to_bits if up else page.from_bits))
        first = asked()
        done = model.resize(current)
        taken.append({"up": up, "seconds": done.seconds, "added": done.added, "read": asked() - first})
    forward(model)
    summary = {}
    for name, up in (("grow", True), ("shrink", False)):
        some = [step for step in taken if step["up"] is up]
        times = sorted(step["seconds"] for step in some)
        summary[name] = {
            "count": len(some),
            "median_ms": round(1e3 * statistics.median(times), 3),
            "p95_ms": round(1e3 * times[int(0.95 * (len(times) - 1))], 3),
            "added_median": int(statistics.median(step["added"] for step in some)),
            "read_per_added": round(sum(step["read"] for step in some) / sum(step["added"] for step in some), 4),
        }
    return {"jumps": jumps, "steps": summary}


def passes(folder: Path) -> dict[str, Any]:
    """Milliseconds of a pass of one token, after growing to 4 bits plane by plane."""
    paged, whole = bitstrata.load(folder, plan=2), bitstrata.load(folder, max_bits=4, bits=4)
    for bits in (3, 4):
        paged.resize(bits)
    times: dict[str, list[float]] = {"paged": [], "whole": []}
    with torch.no_grad():
        for _ in range(30):
            for name, model in (("paged", paged), ("whole", whole)):
                started = time.perf_counter()
                model(torch.tensor([[1]]))
                times[name].append(1e3 * (time.perf_counter() - started))
    medians = {name: round(statistics.median(some), 3) for name, some in times.items()}
    return {"pass": {**medians, "paged_over_whole": round(medians["paged"] / medians["whole"], 3)}}


def child(folder: Path, arguments: argparse.Namespace, task: str, budgets: list[str]) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--task", task, "--folder", str(folder), "--budgets", ",".join(budgets)]
    command += ["--steps", str(arguments.steps), "--threads", str(arguments.threads)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--task", choices=("load", "resize", "pass"), help=argparse.SUPPRESS)
    parser.add_argument("--budgets", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.task:
        budgets = arguments.budgets.split(",")
        tasks = {
            "load": lambda: loads(arguments.folder, budgets),
            "resize": lambda: resizes(arguments.folder, budgets, arguments.steps),
            "pass": lambda: passes(arguments.folder),
        }
        print(json.dumps(tasks[arguments.task]()))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "model"
        if not (folder / "config.json").is_file():
            make(folder, arguments.gigabytes)
        sizes = ModelSizes.of(CheckpointReader(folder))
        low, high = (sizes.of_plan(plan).total for plan in (sizes.smallest, sizes.largest))
        budgets = [f"{-(-(low + (high - low) * i // (BUDGETS - 1)) // 1000)}kB" for i in range(BUDGETS)]
        result: dict[str, Any] = {
            "settings": {"gigabytes": arguments.gigabytes, "steps": arguments.steps, "threads": arguments.threads},
            "machine": describe(arguments.threads),
            "smallest_total": low,
            "largest_total": high,
            "fixed": sizes.fixed,
            "loads": [child(folder, arguments, "load", [budgets[0], budget]) for budget in budgets],
        }
        result |= child(folder, arguments, "resize", budgets)
        result |= child(folder, arguments, "pass", budgets)
    for name in ("loads", "jumps"):
        print(name)
        for entry in result[name]:
            print("  ", entry)
    print("steps", json.dumps(result["steps"], indent=2))
    print("pass", result["pass"])
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
