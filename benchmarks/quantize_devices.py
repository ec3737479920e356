"""How much faster two processes quantize than one, with as many threads each, and whether they write the same bytes.

    python benchmarks/quantize_devices.py MODEL --text TEXT [--blocks 2] [--num-samples 16] [--seq-len 512] [--rounds 1]
                                          [-o FILE]

The time is from the start of the first block to the end of the last of so many, as the job's own progress says. Runs
of one and of two processes take turns; each is broken off after so many blocks, and its folder removed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bitstrata.benchmark.machine import describe


def blocks_of(args: argparse.Namespace, processes: int, folder: Path) -> tuple[float, list[str]]:
    """Seconds of the first blocks, and their digests."""
    command = [
        sys.executable, "-m", "bitstrata.cli.main", "quantize", str(args.model), "-o", str(folder / "out"),
        "--bits", args.bits, "--method", args.method, "--calibration", str(args.text),
        "--num-samples", str(args.num_samples), "--seq-len", str(args.seq_len),
        "--devices", ",".join(["cpu"] * processes),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads * processes)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stderr is not None
        began, lines = 0.0, []
        for line in process.stderr:
            lines.append(line.decode())
            if lines[-1].startswith("takes about"):
                began = time.perf_counter()
            if lines[-1].startswith(f"quantizing: block {args.blocks}/"):
                ended = time.perf_counter()
                process.kill()
                break
        else:
            sys.exit("".join(lines))
    files = [folder / "out" / ".job" / f"block-{index:04d}.safetensors" for index in range(args.blocks)]
    return ended - began, [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--method", default="nested")
    parser.add_argument("--bits", default="2-4")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    seconds: dict[int, list[float]] = {1: [], 2: []}
    found: set[tuple[str, ...]] = set()
    for _ in range(args.rounds):
        for processes, times in seconds.items():
            with tempfile.TemporaryDirectory() as folder:
                took, digests = blocks_of(args, processes, Path(folder))
            times.append(took)
            found.add(tuple(digests))
    ratio = statistics.median(one / two for one, two in zip(seconds[1], seconds[2], strict=True))
    result: dict[str, Any] = {
        "machine": describe(args.threads),
        "model": args.model.name,
        "method": args.method,
        "bits": args.bits,
        "blocks": args.blocks,
        "num_samples": args.num_samples,
        "seq_len": args.seq_len,
        "threads_of_each": args.threads,
        "seconds": {str(processes): times for processes, times in seconds.items()},
        "times_as_fast": ratio,
        "same_bytes": len(found) == 1,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
