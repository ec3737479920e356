"""What fewer calibration tokens cost: divergence from the original by the number of windows.

    python benchmarks/quality_by_tokens.py MODEL --calibration TEXT --text TEXT [--num-samples 16,32,64,128] [-o FILE]

Quantizes with `nested` at 2-4 bits and measures KL divergence on held-out text, a row for each number of windows, the
median over seeds with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

import bitstrata
from bitstrata.benchmark.machine import describe
from bitstrata.tables import render


def measured(args: argparse.Namespace, windows: int, seed: int) -> dict[str, Any]:
    """The divergence at each bits after one quantization, and how long it took."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        report = bitstrata.quantize(
            args.model,
            output,
            bits=args.bits,
            group_size=args.group_size,
            calibration=args.calibration,
            num_samples=windows,
            seq_len=args.seq_len,
            seed=seed,
        )
        found = bitstrata.evaluate(
            output, args.text, reference=args.model, seq_len=args.seq_len, max_tokens=args.max_tokens
        )
    kld = {str(result.bits): result.kld for result in found.results}
    return {"windows": windows, "seed": seed, "kld": kld, "seconds": report.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", default="2-4")
    parser.add_argument("--num-samples", default="16,32,64,128")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=20_000)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    runs = []
    for windows in map(int, args.num_samples.split(",")):
        for seed in map(int, args.seeds.split(",")):
            runs.append(measured(args, windows, seed))
            print(json.dumps(runs[-1]), flush=True)
    bits = list(runs[0]["kld"])
    rows = []
    for windows in dict.fromkeys(run["windows"] for run in runs):
        mine = [run["kld"] for run in runs if run["windows"] == windows]
        cells = []
        for value in bits:
            found = [run[value] for run in mine]
            cells.append(f"{statistics.median(found):.4f} ({min(found):.4f}-{max(found):.4f})")
        rows.append([str(windows), str(windows * args.seq_len), *cells])
    print(render(f"{args.model.name}: KLD by calibration tokens", ["windows", "tokens", *bits], rows))
    if args.output:
        settings = {"seq_len": args.seq_len, "group_size": args.group_size, "text": args.text.name}
        settings |= {"model": args.model.name, "calibration": args.calibration.name, "max_tokens": args.max_tokens}
        result = {"machine": describe(torch.get_num_threads()), "settings": settings, "runs": runs}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
