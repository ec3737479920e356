"""How long does the exact solver take for a large model? Random losses and real sizes; needs no model.

    python benchmarks/milp.py [--blocks 80] [--budgets 5]

The shapes are Llama-3-70B's, bits 2 to 8, and losses fall by a random factor of about 4 a bit. Prints
seconds for each budget and, as the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch

from bitstrata.allocation import Problem, milp, paired, waterfill
from bitstrata.benchmark.machine import describe
from bitstrata.planes.weights import scales_bytes

BITS = range(2, 9)
SHAPES = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)]


def problem(blocks: int, bpw: float, seed: int = 0) -> Problem:
    generator = np.random.default_rng(seed)
    shapes = SHAPES * blocks
    unit = np.repeat(np.arange(len(shapes)), len(BITS))
    bits = np.tile(np.array(BITS), len(shapes))
    sizes = [4 * b * n * k // 32 + scales_bytes("affine8", b, n, k, 128) for n, k in shapes for b in BITS]
    height = np.exp(generator.normal(0, 1.5, len(shapes)))[:, None]
    slope = np.cumsum(generator.uniform(0.8, 2.0, (len(shapes), len(BITS))), axis=1)
    losses = (height * np.exp(-slope)).ravel()
    return Problem(
        units=[(str(index),) for index in range(len(shapes))],
        unit=unit,
        bits=bits,
        bytes=np.array(sizes),
        constant=0.0,
        linear=np.zeros(len(unit)),
        products=np.diag(losses),
        limit=int(bpw / 8 * sum(n * k for n, k in shapes)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=80)
    parser.add_argument("--budgets", type=int, default=5)
    arguments = parser.parse_args()
    found = []
    for bpw in np.linspace(2.6, 6.6, arguments.budgets):
        made = problem(arguments.blocks, bpw)
        seconds = {}
        for solver in (milp, waterfill, paired):
            started = time.perf_counter()
            x = solver.solve(made)
            seconds[solver.__name__.rpartition(".")[2]] = time.perf_counter() - started
            if solver is milp:
                best = made.loss(x)
            print(
                f"{bpw:.2f}bpw {solver.__name__.rpartition('.')[2]:10} {time.perf_counter() - started:7.3f} s"
                f"   loss {made.loss(x) / best:.5f} of milp's"
            )
        found.append({"bpw": float(bpw), "choices": len(made.unit), "seconds": seconds})
    print(json.dumps({"machine": describe(torch.get_num_threads()), "blocks": arguments.blocks, "budgets": found}))


if __name__ == "__main__":
    main()
