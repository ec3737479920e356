"""What idle, slow and dripping connections cost the clients that work.

Starts `bitstrata serve OUT`, and keeps 16 streamed requests under way, in turns alone and beside `--idle` connections
that send nothing and `--slow` ones: a third drips a header, a third a body, a third asks for metrics again and again
and reads none. Those that the server cuts off come back at once. Reports the ratio of the time per request, beside over
alone, round by round, and how many the server closed.

    python benchmarks/hostile_clients.py OUT [--idle 300] [--slow 50] [--rounds 5] [--requests 64] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import urllib.parse
from collections import Counter
from pathlib import Path

import torch
from serving import load, requests, server

from bitstrata.benchmark.machine import describe

DRIP_SECONDS = 0.5
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class Hostile:
    """Connections that are kept open for as long as it lasts; `ended` counts those that the server closed, by kind."""

    def __init__(self, where: urllib.parse.SplitResult, idle: int, slow: int) -> None:
        self.where, self.ended = where, Counter[str]()
        self.kinds = ["idle"] * idle + [("header", "body", "reader")[place % 3] for place in range(slow)]

    async def __aenter__(self) -> Hostile:
        self.tasks = [asyncio.create_task(self.keep(kind)) for kind in self.kinds]
        await asyncio.sleep(2)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def keep(self, kind: str) -> None:
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                reader, writer = await asyncio.open_connection(self.where.hostname, self.where.port, limit=1024)
                try:
                    await getattr(self, kind)(reader, writer)
                finally:
                    writer.close()
            self.ended[kind] += 1
            await asyncio.sleep(DRIP_SECONDS)

    async def idle(self, reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read(1)  # until the server closes

    async def header(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        while True:
            writer.write(b"X-Slow: 1\r\n")
            await writer.drain()
            await asyncio.sleep(DRIP_SECONDS)

    async def body(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"Content-Length: 5000\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(DRIP_SECONDS)

    async def reader(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Asks for what is said of the server again and again, and reads nothing of it."""
        while True:
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await writer.drain()
            await asyncio.sleep(DRIP_SECONDS)


async def measure(args: argparse.Namespace, address: str) -> dict[str, object]:
    chance, where = random.Random(args.seed), urllib.parse.urlsplit(address)

    async def seconds() -> float:
        _, taken = await load(address, requests(args, args.requests, args.new, chance), args.concurrency)
        return taken

    await seconds()
    ratios, ended = [], Counter[str]()
    for _ in range(args.rounds):
        before = await seconds()
        async with Hostile(where, args.idle, args.slow) as others:
            beside = await seconds()
            ended += others.ended
        ratios.append(beside / ((before + await seconds()) / 2))
    return {"beside / alone": ratios, "median": statistics.median(ratios), "closed by the server": dict(ended)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", help="a checkpoint to serve")
    parser.add_argument("--bits", default="2,3,4")
    numbers = {"idle": 300, "slow": 50, "rounds": 5, "requests": 64, "concurrency": 16, "prompt": 64, "new": 24}
    for name, value in {**numbers, "seed": 0, "vocabulary": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    with server(args.out, None, args.idle + args.slow + args.concurrency) as (address, _):
        result = asyncio.run(measure(args, address))
    settings = {key: value for key, value in vars(args).items() if key != "json"} | {"out": Path(args.out).name}
    text = json.dumps({"machine": describe(torch.get_num_threads()), "settings": settings, "result": result}, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
