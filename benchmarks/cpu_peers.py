"""Our CPU kernels beside ONNX Runtime, ggml and torch: single products y = x W^T, in one run, taking turns.

    pip install .[peers]
    python benchmarks/cpu_peers.py [--shapes 4096x4096,2048x8192] [--threads 1] [--peers ours,ort,ggml,torch]
    python benchmarks/cpu_peers.py --quick

Each contender is first compared with its own decoded weight in float64; one that is wrong is named and not measured.
Then they take turns in two regimes: `cache`, one matrix again and again (as far as it fits), and `memory`, a set of
matrices several times as large as the last cache, in turn. ONNX Runtime and ggml take and give float32 and make int8
inside; ours is measured with float32 activations, which is the fair pair, and with bf16, which models use.
A call from Python is part of every time; `--shapes 64x256` shows what it costs each library. Prints a table for each
shape and regime, and writes all of it to `--json`, by default to benchmarks/results/; --quick writes only on request.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import torch
from peers import ggml, ort, ours, torch_peer
from peers.contender import Contender, Problem, check
from peers.measure import REGIMES, OtherProcesses, race
from peers.table import HEAD, Result, compare, table

from bitstrata.benchmark.machine import Bandwidth, describe
from bitstrata.benchmark.run import DEFAULT_SHAPES, parse_shapes
from bitstrata.errors import BitstrataError, CheckError, ResourceError, UsageError

PEERS: dict[str, ModuleType] = {"ours": ours, "ort": ort, "ggml": ggml, "torch": torch_peer}
MEMORY_BYTES = 1 << 28
CACHES = 4  # as many times the last cache do the matrices of the memory regime hold
SETS = 20  # as many times these bytes must be free: one set a contender
OUTS, COLUMNS = 64, 256  # N and K are multiples of these, so that every peer can run every shape
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    arguments = _arguments()
    try:
        sys.exit(_run(arguments))
    except BitstrataError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", help=f"NxK,NxK or a known model's name; {DEFAULT_SHAPES} by default")
    parser.add_argument("--rows", type=int, default=1, help="rows of x")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--group-size", type=int, default=128, help="of ours, ONNX Runtime and torch int4")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--regimes", default=",".join(REGIMES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--burst-ms", type=float, default=15, help="of each contender in each round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one small shape, two rounds: does everything run?")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shapes = arguments.shapes or "1024x1024"
        arguments.rounds, arguments.burst_ms = 2, 3
    return arguments


def _run(arguments: argparse.Namespace) -> int:
    shapes = parse_shapes(arguments.shapes or DEFAULT_SHAPES)
    regimes = _chosen(arguments.regimes, REGIMES, "--regimes")
    names = _chosen(arguments.peers, tuple(PEERS), "--peers")
    _check_arguments(arguments, shapes)
    torch.set_num_threads(arguments.threads)

    skipped: list[str] = []
    peers: list[str] = []
    for name in names:
        reason = PEERS[name].missing()
        if reason is None:
            peers.append(name)
        else:
            skipped.append(f"{name}: {reason}; install with `pip install .[peers]`")
            print(f"skipped {skipped[-1]}")
    memory_bytes = _memory_bytes(arguments.quick) if "memory" in regimes else 0
    versions = {key: value for name in peers for key, value in PEERS[name].versions().items()}
    machine = {**describe(arguments.threads), **versions}
    print(", ".join(f"{key} {value}" for key, value in machine.items()), f"\n{HEAD}")

    others, bandwidth = OtherProcesses(), Bandwidth(arguments.threads)
    results: list[Result] = []
    refused: list[str] = []
    for shape in shapes:
        problem = _problem(arguments, shape, memory_bytes)
        contenders = [contender for name in peers for contender in PEERS[name].contenders(problem)]
        for reason in problem.skipped:
            print(f"skipped {reason}")
        checked, errors = _checked(contenders, shape, refused)
        for regime in regimes:
            timings = race(
                checked,
                regime,
                rounds=arguments.rounds,
                burst=arguments.burst_ms / 1e3,
                threads=arguments.threads,
                seed=arguments.seed,
                before_round=bandwidth.sample,
            )
            part = compare(checked, timings, errors, shape=shape, rows=arguments.rows, regime=regime)
            results += part
            print(f"\n{table(part)}" if part else f"\n{shape[0]}x{shape[1]}: nothing to measure")
        skipped += [reason for reason in problem.skipped if reason not in skipped]
        del contenders, checked, problem
        gc.collect()  # a set of matrices a contender: the next shape needs the room
    print(f"\nmemory streams {bandwidth.bytes_per_second / 1e9:.1f} GB/s with {arguments.threads} threads")
    busy = others.cores()
    if warning := others.warning(busy):
        print(warning)
    report = {
        "machine": machine,
        "settings": _settings(arguments, memory_bytes),
        "bandwidth_gigabytes_per_second": round(bandwidth.bytes_per_second / 1e9, 2),
        "cores_busy_with_other_processes": round(busy, 2),
        "skipped": skipped,
        "refused": refused,
        "results": [result.to_json() for result in results],
    }
    _write(arguments, report)
    return CheckError.exit_code if refused else 0


def _checked(
    contenders: list[Contender], shape: tuple[int, int], refused: list[str]
) -> tuple[list[Contender], list[float]]:
    """The contenders whose results are right, and their errors."""
    right, errors = [], []
    for contender in contenders:
        try:
            errors.append(check(contender, shape[0]))
        except CheckError as error:
            refused.append(f"{shape[0]}x{shape[1]}, x in {contender.activations}: {error.message}")
            print(f"REFUSED {refused[-1]}; it is not measured")
        else:
            right.append(contender)
    return right, errors


def _problem(arguments: argparse.Namespace, shape: tuple[int, int], memory_bytes: int) -> Problem:
    generator = torch.Generator().manual_seed(arguments.seed)
    weight = torch.randn(shape, generator=generator) * shape[1] ** -0.5
    x = torch.randn(arguments.rows, shape[1], generator=generator)
    return Problem(x, weight, arguments.group_size, memory_bytes, arguments.threads, arguments.seed)


def _chosen(text: str, known: tuple[str, ...], flag: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UsageError(f"{flag} {text!r} cannot be used", hint=f"give some of {','.join(known)}")
    return names


def _check_arguments(arguments: argparse.Namespace, shapes: list[tuple[int, int]]) -> None:
    for name in ("rows", "threads", "rounds", "group_size"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    for outs, columns in shapes:
        if outs % OUTS or columns % COLUMNS or columns % arguments.group_size:
            raise UsageError(
                f"shape {outs}x{columns} cannot be used",
                hint=f"the peers need N a multiple of {OUTS}, and K of {COLUMNS} and of the group size",
            )


def _memory_bytes(quick: bool) -> int:
    cache = max((_size(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")), default=0)
    wanted = max(MEMORY_BYTES, CACHES * cache) if not quick else MEMORY_BYTES // 8
    free = psutil.virtual_memory().available
    if SETS * wanted > free:
        raise ResourceError(
            f"the memory regime needs about {SETS * wanted / 1e9:.0f} GB, {free / 1e9:.0f} GB are free",
            hint="give --regimes cache",
        )
    return wanted


def _size(path: Path) -> int:
    text = path.read_text().strip()
    return int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]]


def _settings(arguments: argparse.Namespace, memory_bytes: int) -> dict[str, Any]:
    keys = ("rows", "threads", "group_size", "rounds", "burst_ms", "seed", "quick")
    return {key: getattr(arguments, key) for key in keys} | {"memory_regime_bytes": memory_bytes}


def _write(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    path = arguments.json
    if path is None and not arguments.quick:
        path = RESULTS / f"cpu-peers-{arguments.threads}-threads-{arguments.rows}-rows.json"
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
