"""What `quantize --dry-run` says of large models, and how long it takes to say it.

    python benchmarks/quantize_preflight.py [--sizes 8B,70B] [--bits 2-4] [--method nested] [-o FILE]

The models have the shapes of Llama 3.1; their weights are holes in files that take no room on the disk. It runs the
public command, whose words on time, memory and disk are kept; they are said even where this machine is too small.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bitstrata.benchmark.machine import describe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from sparse_models import sparse_llama

WORDS = "takes about"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="8B,70B")
    parser.add_argument("--bits", default="2-4")
    parser.add_argument("--method", default="nested")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as workspace:
        root = Path(workspace)
        words = random.Random(0)
        vocabulary = [f"w{number}" for number in range(10)]
        (root / "text.txt").write_text(" ".join(words.choices(vocabulary, k=400_000)))
        for size in args.sizes.split(","):
            model = sparse_llama(root / size, size)
            command = [sys.executable, "-m", "bitstrata.cli.main", "quantize", str(model), "-o", str(root / "out")]
            command += ["--bits", args.bits, "--method", args.method, "--calibration", str(root / "text.txt")]
            began = time.perf_counter()
            run = subprocess.run(
                [*command, "--dry-run", "--device", "cpu"], capture_output=True, text=True, check=False
            )
            seconds = time.perf_counter() - began
            said = [line[line.index(WORDS) :] for line in run.stderr.splitlines() if WORDS in line]
            if not said:
                sys.exit(run.stderr)
            rows.append({"model": f"Llama-3.1-{size}", "seconds": seconds, "said": said[-1]})
    result = {"machine": describe(torch.get_num_threads()), "method": args.method, "bits": args.bits, "models": rows}
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
