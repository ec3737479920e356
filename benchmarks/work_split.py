"""How well the loops of a decoding step divide among threads, by simulation: no machine with so many is needed.

    python benchmarks/work_split.py [--shape llama-3.2-1b] [--threads 1,2,4,8,16,32,64]

Every loop of native/step.cpp is divided as native/threads.cpp does: a thread that is free takes 1 / (2 threads) of what
is left, at least one block. A block of 16 outputs costs what its bytes at 4 bits take at CORE_GB of a core, as long as
the cores together do not exceed MEMORY_GB; a piece costs PIECE, a loop LOOP more, and what is done by one thread
(norms, the int8 activations of one row) SERIAL a number. The share is what the threads would take without any loss,
over what they take. What it leaves out: memory on another NUMA node, and cores at different speeds.
"""

from __future__ import annotations

import argparse
import heapq

from bitstrata.benchmark.random_model import SHAPES, shape_config
from bitstrata.tables import render

CORE_GB, MEMORY_GB = 20e9, 300e9  # bytes a second; a server with eight channels
PIECE, LOOP, SERIAL = 0.3e-6, 1.5e-6, 0.6e-9  # seconds
BITS = 4.25


def makespan(blocks: int, seconds: float, threads: int) -> float:
    """Time of a loop over `blocks` pieces of work of `seconds` each."""
    free = [0.0] * min(threads, blocks)
    begin = 0
    while begin < blocks:
        at = heapq.heappop(free)
        piece = max(1, (blocks - begin) // (2 * threads))
        heapq.heappush(free, at + PIECE + piece * seconds)
        begin += piece
    return max(free) + LOOP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.2-1b", choices=sorted(SHAPES))
    parser.add_argument("--threads", default="1,2,4,8,16,32,64")
    arguments = parser.parse_args()
    config = shape_config(arguments.shape)
    hidden, inner, width = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    # outputs and inputs of each loop's layers, and the numbers that one thread prepares for it
    loops = [(queries + 2 * keys, hidden, hidden), (hidden, queries, queries), (2 * inner, hidden, hidden)]
    loops += [(hidden, inner, inner)]
    rows = []
    for threads in map(int, arguments.threads.split(",")):
        speed = min(CORE_GB, MEMORY_GB / threads)
        total = ideal = 0.0
        for outputs, inputs, serial in [*loops * config.num_hidden_layers, (config.vocab_size, hidden, hidden)]:
            block = 16 * inputs * BITS / 8 / speed
            total += makespan(outputs // 16, block, threads) + serial * SERIAL
            ideal += outputs / 16 * block / threads
        rows.append([str(threads), f"{1e3 * total:.2f}", f"{1 / total:.0f}", f"{ideal / total:.2f}"])
    print(render(f"{arguments.shape}, one row, simulated", ["threads", "ms a token", "tok/s", "share"], rows))


if __name__ == "__main__":
    main()
