"""What int8 activations and byte levels cost: the change of nll on a real model, at each bits.

A CPU's kernels quantize activations to int8 and look weights up as byte levels. This script evaluates a checkpoint
three times a precision, with the kernel forced to float32 arithmetic (`<isa>-exact`), to int8 (`<isa>-int8`), and to
the reference, and prints the differences.

    python benchmarks/activations.py OUT --text heldout.txt [--max-tokens N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

import bitstrata
from bitstrata.benchmark.machine import describe
from bitstrata.kernels import select
from bitstrata.kernels.registry import ENVIRONMENT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--max-tokens", type=int, default=30_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    isa = select("cpu", torch.float32).name
    nll: dict[str, dict[str, float]] = {}
    for kernel in ("reference", f"{isa}-exact", f"{isa}-int8"):
        os.environ[ENVIRONMENT] = kernel
        result = bitstrata.evaluate(arguments.model, text=arguments.text, max_tokens=arguments.max_tokens)
        nll[kernel] = {str(row.bits): row.nll for row in result.results}
    exact = nll[f"{isa}-exact"]
    print(f"{arguments.model}: nll, and its change in nats a token")
    for bits, base in exact.items():
        change = nll[f"{isa}-int8"][bits] - base
        drift = base - nll["reference"][bits]
        print(f"  {bits} bits: exact {base:.5f}, int8 {change:+.5f}, exact against the reference {drift:+.2e}")
    if arguments.json:
        settings = {"model": Path(arguments.model).name, "text": Path(arguments.text).name, "tokens": result.tokens}
        arguments.json.write_text(
            json.dumps({"machine": describe(torch.get_num_threads()), "settings": settings, "nll": nll}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
