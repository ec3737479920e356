"""A server under load: throughput, time to the first token, time per token, and memory.

Starts `bitstrata serve OUT` on a free port (or uses the one at --url), keeps `--concurrency` streamed requests at
mixed bits under way until `--requests` are answered, and reports what the clients saw. Clients and server share the
machine. Prompts are random tokens of half to one and a half times `--prompt`; every request makes `--new` tokens.

    python benchmarks/serving.py OUT|--url URL [--bits 2,3,4] [--requests 128] [--concurrency 16] [--prompt 64]
        [--new 48] [--warm-up 16] [--soak 0] [--threads N] [--seed 0] [--json FILE]

`--soak 2000` afterwards sends so many requests of two tokens and reports the server's memory before and after.
Times in seconds; memory is the server's resident set, in bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from bitstrata.benchmark.machine import describe
from bitstrata.plans import parse_bits

SOAK_TOKENS = 2


@dataclass(frozen=True)
class Seen:
    """One answered request: when its first and last tokens came, after it was sent, and how many there were."""

    first: float
    last: float
    tokens: int
    bits: Counter[str]


@contextmanager
def server(out: str, threads: int | None, connections: int) -> Iterator[tuple[str, psutil.Process]]:
    """A `bitstrata serve` process and its address."""
    command = [sys.executable, "-m", "bitstrata.cli.main", "serve", out, "--port", "0"]
    command += ["--max-connections", str(max(connections, 512))]
    environment = dict(os.environ) if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stderr is not None
        for line in child.stderr:
            sys.stderr.write(line)
            if found := re.search(r" at (http://\S+)/v1 ", line):
                try:
                    yield found[1], psutil.Process(child.pid)
                finally:
                    child.terminate()
                return
    raise SystemExit("the server did not start")


async def ask(address: urllib.parse.SplitResult, body: dict[str, object]) -> Seen:
    """Send one streamed completion and read its events as they come."""
    data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=2**20)
    key = f"Authorization: Bearer {os.environ['BITSTRATA_API_KEY']}\r\n" if "BITSTRATA_API_KEY" in os.environ else ""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n{key}"
    started = time.perf_counter()
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"refused: {status.decode().strip()} {(await reader.read(2000)).decode()}")
    first = last = 0.0
    usage: dict[str, dict[str, int]] = {}
    async for line in reader:
        if line == b"data: [DONE]\n":
            break
        if line.startswith(b"data: "):
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise SystemExit(chunk["error"]["message"])
            usage = chunk.get("usage") or usage
            if chunk["choices"]:
                last = time.perf_counter() - started
                first = first or last
    writer.close()
    counts = Counter(usage["bits"])
    return Seen(first, last, counts.total(), counts)


async def load(address: str, bodies: list[dict[str, object]], concurrency: int) -> tuple[list[Seen], float]:
    """Answer all of `bodies`, so many at a time -> what was seen, and the seconds it took."""
    places = asyncio.Semaphore(concurrency)
    where = urllib.parse.urlsplit(address)

    async def one(body: dict[str, object]) -> Seen:
        async with places:
            return await ask(where, body)

    started = time.perf_counter()
    seen = await asyncio.gather(*(one(body) for body in bodies))
    return seen, time.perf_counter() - started


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{share}": ordered[min(len(ordered) - 1, share * len(ordered) // 100)] for share in (50, 90, 99)}


def report(seen: list[Seen], seconds: float) -> dict[str, object]:
    tokens = sum(item.tokens for item in seen)
    between = [(item.last - item.first) / (item.tokens - 1) for item in seen if item.tokens > 1]
    return {
        "requests": len(seen),
        "seconds": seconds,
        "tok_s": tokens / seconds,
        "requests_s": len(seen) / seconds,
        "ttft": percentiles([item.first for item in seen]),
        "tpot": percentiles(between),
        "latency_mean": statistics.mean(item.last for item in seen),
        "tokens_by_bits": dict(sum((item.bits for item in seen), Counter[str]())),
    }


def requests(args: argparse.Namespace, count: int, new: int, chance: random.Random) -> list[dict[str, object]]:
    bits = parse_bits(args.bits)
    made = []
    for index in range(count):
        length = chance.randint(max(1, args.prompt // 2), max(1, args.prompt * 3 // 2))
        prompt = [chance.randrange(args.vocabulary) for _ in range(length)]
        made.append(
            {
                "prompt": prompt,
                "max_tokens": new,
                "bits": bits[index % len(bits)],
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,  # so that every token is an event, whether it is text or not
            }
        )
    return made


def measure(args: argparse.Namespace, address: str, process: psutil.Process | None) -> dict[str, object]:
    def memory() -> int | None:
        return None if process is None else process.memory_info().rss

    chance = random.Random(args.seed)
    asyncio.run(load(address, requests(args, args.warm_up, args.new, chance), args.concurrency))
    result: dict[str, object] = {"rss_start": memory()}
    result |= report(*asyncio.run(load(address, requests(args, args.requests, args.new, chance), args.concurrency)))
    result["rss_end"] = memory()
    if args.soak:
        soaked = asyncio.run(load(address, requests(args, args.soak, SOAK_TOKENS, chance), args.concurrency))
        result["soak"] = {**report(*soaked), "rss_start": result["rss_end"], "rss_end": memory()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", nargs="?", help="a checkpoint to serve")
    parser.add_argument("--url", help="a server that runs already, http://host:port; its key in BITSTRATA_API_KEY")
    parser.add_argument("--bits", default="2,3,4")
    numbers = {"requests": 128, "concurrency": 16, "prompt": 64, "new": 48, "warm-up": 16, "soak": 0, "seed": 0}
    for name, value in {**numbers, "vocabulary": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    if (args.out is None) == (args.url is None):
        parser.error("give a checkpoint or --url")
    if args.url is not None:
        urllib.request.urlopen(f"{args.url}/health").close()
        result = measure(args, args.url, None)
    else:
        with server(args.out, args.threads, args.concurrency) as (address, process):
            result = measure(args, address, process)
    ttft, tpot = result["ttft"], result["tpot"]
    assert isinstance(ttft, dict)
    assert isinstance(tpot, dict)
    print(
        f"{result['tok_s']:.0f} tok/s, {result['requests_s']:.1f} requests/s; "
        f"first token {1e3 * ttft['p50']:.0f} / {1e3 * ttft['p90']:.0f} / {1e3 * ttft['p99']:.0f} ms, "
        f"between tokens {1e3 * tpot['p50']:.1f} / {1e3 * tpot['p90']:.1f} / {1e3 * tpot['p99']:.1f} ms (p50/p90/p99)",
        file=sys.stderr,
    )
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    settings |= {"out": args.out and Path(args.out).name}
    machine = describe(args.threads or torch.get_num_threads())
    text = json.dumps({"machine": machine, "settings": settings, "result": result}, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
