"""Where the time of `quantize` goes: a few blocks of a model, and what each spends on what.

    python benchmarks/quantize_speed.py MODEL --text TEXT [--blocks 2] [--num-samples 64] [--seq-len 512] [-o FILE]

Seconds of each block, split into forward passes, moments, the solver, and the rest: reading the source, chains to and
from the disk, decoding, writing. The job is broken off after so many blocks, and its folder removed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import bitstrata
from bitstrata.benchmark.machine import describe
from bitstrata.calibration import BlockRunner
from bitstrata.memory import peak_memory
from bitstrata.progress import Steps
from bitstrata.quantization.block_task import BlockTask
from bitstrata.solvers import METHODS

PARTS = ("forward", "moments", "solver", "rest")


class EnoughError(Exception):
    """So many blocks are done."""


class Clock:
    """Seconds spent in each part since the last block; a part inside another counts only for itself."""

    def __init__(self, blocks: int) -> None:
        self.left = blocks
        self.rows: list[dict[str, float]] = []
        self._open: list[str] = ["rest"]
        self._since = time.perf_counter()
        self._spent = dict.fromkeys(PARTS, 0.0)

    def _switch(self) -> None:
        now = time.perf_counter()
        self._spent[self._open[-1]] += now - self._since
        self._since = now

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._open.append(part)
            try:
                return call(*args, **kwargs)
            finally:
                self._switch()
                self._open.pop()

        return wrapper

    def start(self) -> None:
        """A block begins: what came before it does not count."""
        self._switch()
        self._spent = dict.fromkeys(PARTS, 0.0)

    def block_done(self) -> None:
        self._switch()
        self.rows.append({**self._spent, "total": sum(self._spent.values())})
        self.start()
        self.left -= 1
        if not self.left:
            raise EnoughError


@contextlib.contextmanager
def watched(clock: Clock, method: str) -> Iterator[None]:
    """The package's functions, timed."""
    kind = METHODS[method]
    places: list[tuple[Any, str, str]] = [(BlockRunner, "call", "forward"), (BlockTask, "moments", "moments")]
    places += [(kind, "solve", "solver")] if hasattr(kind, "solve") else [(kind, "solve_block", "solver")]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    step, enter = Steps.step, Steps.__enter__
    try:
        for owner, name, part in places:
            setattr(owner, name, clock.timed(part, getattr(owner, name)))
        Steps.step = lambda self, *a, **k: (step(self, *a, **k), clock.block_done())[0]  # type: ignore[method-assign, assignment, return-value, func-returns-value]
        Steps.__enter__ = lambda self: (clock.start(), enter(self))[1]  # type: ignore[method-assign, assignment, return-value]
        yield
    finally:
        for owner, name, call in before:
            setattr(owner, name, call)
        Steps.step, Steps.__enter__ = step, enter  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--method", default="nested")
    parser.add_argument("--bits", default="2-4")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of quantize's arguments")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    clock = Clock(args.blocks)
    more = dict(item.split("=", 1) for item in args.set)
    with tempfile.TemporaryDirectory() as folder, watched(clock, args.method), contextlib.suppress(EnoughError):
        bitstrata.quantize(
            args.model,
            Path(folder) / "out",
            method=args.method,
            bits=args.bits,
            calibration=args.text,
            num_samples=args.num_samples,
            seq_len=args.seq_len,
            **more,
        )
    for row in clock.rows:
        print("  ".join(f"{name} {seconds:.2f} s" for name, seconds in row.items()))
    result = {
        "machine": describe(torch.get_num_threads()),
        "model": args.model.name,
        "method": args.method,
        "bits": args.bits,
        "num_samples": args.num_samples,
        "seq_len": args.seq_len,
        **more,
        "blocks": clock.rows,
        "peak_memory_bytes": peak_memory(),
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
