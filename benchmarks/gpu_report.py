"""Everything that a GPU is asked, in one command of at most eight minutes, with a result after each part.

    make gpu-report                                    into build/gpu-report.json; needs torch for CUDA and Triton
    python benchmarks/gpu_report.py --output FILE      nothing has to be installed: src/ is used as it is

Parts, in the order of their worth: what is there; kernels against float64; steps of whole models, jobs and bench beside
the CPU's results; one row at 2, 3 and 4 bits beside the bandwidth of a copy; the same with the shapes of the programs
searched first; a whole model as `generate` runs it, a step one graph for all bits, beside bf16. Each is a process
with a limit of its own, so that one that fails or hangs leaves the others; FILE is written after each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
SHAPES = "4096x14336,14336x4096,8192x28672"
MODELS = ("step", "runtime", "resize", "bench", "quantize")  # tests, in the order of their worth
SECONDS = 480.0  # in all


def parts(python: str, folder: Path) -> list[tuple[str, list[str], float]]:
    """(name, command, seconds that it may take)."""
    gpu = [python, "benchmarks/gpu.py", "--bits", "2,3,4"]
    rows = ["--shapes", SHAPES, "--rows", "1,16", "--model", "none", "--rounds", "7"]
    tuning = ["--tune", "--shapes", "4096x14336,4096x4096", "--rows", "1", "--model", "none", "--rounds", "7"]
    whole = ["--shapes", "4096x4096", "--rows", "1", "--model", "llama-3.1-8b", "--rounds", "7"]
    tests = [python, "-m", "pytest", "-q", "-m", "gpu", "--maxfail", "8"]
    return [  # 480 seconds together
        ("environment", [python, "-m", "bitstrata.cli.main", "env", "--json"], 30),
        ("kernels", [*tests, "tests/kernels"], 70),
        ("models", [*tests, *(f"tests/gpu/test_gpu_{name}.py" for name in MODELS)], 80),
        ("one row", [*gpu, *rows, "--output", str(folder / "rows.json")], 80),
        ("tuned", [*gpu, *tuning, "--output", str(folder / "tuned.json")], 80),
        ("whole model", [*gpu, *whole, "--output", str(folder / "whole.json")], 140),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-report.json")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="in all; parts that no time is left for are named"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"error: torch {torch.__version__} sees no GPU", file=sys.stderr)
        return 2
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    report: list[dict[str, Any]] = []
    for name, command, limit in parts(sys.executable, arguments.output.parent):
        left = arguments.seconds - (time.monotonic() - began)
        print(f"== {name}", flush=True)
        report.append(run(name, command, min(limit, left), environment))
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"== {name}: {report[-1]['outcome']}, {report[-1]['seconds']} s", flush=True)
    return any(part["outcome"] != "done" for part in report)


def run(name: str, command: list[str], limit: float, environment: dict[str, str]) -> dict[str, Any]:
    if limit < 10:
        return {"part": name, "outcome": "no time left", "seconds": 0}
    began = time.monotonic()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    try:
        text, _ = done.communicate(timeout=limit)
        outcome = "done" if done.returncode == 0 else f"ended with {done.returncode}"
    except subprocess.TimeoutExpired:
        done.kill()
        text, _ = done.communicate()
        outcome = f"cut off after {limit:.0f} s"
    print(text, flush=True)
    part: dict[str, Any] = {"part": name, "outcome": outcome, "seconds": round(time.monotonic() - began)}
    if "--output" in command:
        written = Path(command[command.index("--output") + 1])
        if outcome == "done" and written.exists():
            return part | {"result": json.loads(written.read_text())}
    return part | {"output": text.splitlines()[-40:]}


if __name__ == "__main__":
    sys.exit(main())
