"""What rows at different bits in one call cost over the same rows at the highest of them.

One layer from cache, taking turns: all rows at 4 bits, rows at 2, 3 and 4 bits in turn, and each of these in a call of
its own. Medians in milliseconds, and the ratio to 4 bits within a round.

    python benchmarks/mixed_rows.py [--shape 4096x4096] [--threads 1] [--rows 4,8,16] [--rounds 25]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bitstrata.benchmark.random_model import random_weight
from bitstrata.kernels import pack

BITS = (2, 3, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="4096x4096")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", default="4,8,16")
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    out_features, in_features = map(int, arguments.shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    weight = pack(random_weight(out_features, in_features, BITS, 128, generator), dtype=torch.bfloat16)

    def apart(x: Tensor, mixed: Tensor) -> None:
        for bits in BITS:
            weight.linear(x[mixed == bits], bits)

    for rows in map(int, arguments.rows.split(",")):
        x = torch.randn(rows, in_features, generator=generator).bfloat16()
        mixed = torch.tensor(BITS, dtype=torch.int8)[torch.arange(rows) % len(BITS)]
        calls: dict[str, Callable[[], object]] = {
            "4": lambda x=x: weight.linear(x, 4),
            "2/3/4": lambda x=x, mixed=mixed: weight.linear(x, mixed),
            "one by one": lambda x=x, mixed=mixed: apart(x, mixed),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(arguments.rounds + 2):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
        base = times["4"][2:]
        parts = []
        for name, all_times in times.items():
            ratio = statistics.median(t / b for t, b in zip(all_times[2:], base, strict=True))
            parts.append(f"{name}: {statistics.median(all_times[2:]) * 1e3:.3f} ms, {ratio:.2f}x")
        print(f"{rows:3} rows  " + "   ".join(parts))


if __name__ == "__main__":
    main()
