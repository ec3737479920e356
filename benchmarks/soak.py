"""Thousands of requests of all kinds, and whether the server's memory stays where it is.

Two servers, one after the other, half of the requests each: one with all planes and a policy that lowers bits by load;
one that holds a plan's pages, resized every second. Requests are completions and chats, streamed or not, at mixed
bits, texts to tokenize, bad bodies, prompts that are too long, streams that the client leaves. No answer may have
another status than is due, and no stream end without its last event. Reports the memory after each tenth.

    python benchmarks/soak.py OUT [--requests 3000] [--concurrency 24] [--seed 0] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import random
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from bitstrata.benchmark.machine import describe

RESIZE_SECONDS = 1.0
POLICY = "load:target_ms=5"  # below what a step takes with a few requests, and above what one takes alone
KINDS = ("stream", "stream", "whole", "chat", "left", "tokens", "bad", "long")


def run_server(out: str, sized: bool, ready: Connection, seed: int) -> None:
    """A server in a process of its own; sends its address. `sized`: holds one plan's pages, resized while it runs."""
    import bitstrata
    from bitstrata.checkpoint import CheckpointReader
    from bitstrata.models import load_tokenizer
    from bitstrata.plans import Plan
    from bitstrata.runtime import Engine
    from bitstrata.runtime.policy import parse_policy
    from bitstrata.serve.app import create_app
    from bitstrata.serve.process import address, bind, serve
    from bitstrata.serve.settings import Settings

    logging.getLogger("bitstrata").setLevel(logging.ERROR)
    spec = CheckpointReader(Path(out)).spec
    plans = [Plan.uniform(spec, bits) for bits in spec.bits]
    model = bitstrata.load(out, plan=plans[-1]) if sized else bitstrata.load(out)
    tokenizer = load_tokenizer(out)
    chance = random.Random(seed)

    def resize() -> None:
        while True:
            time.sleep(RESIZE_SECONDS)
            bitstrata.resize(model, chance.choice(plans))

    with (
        bind("127.0.0.1", 0) as bound,
        Engine(model, tokenizer, policy=None if sized else parse_policy(POLICY)) as engine,
    ):
        app = create_app(engine, tokenizer, Settings("model", min_bits=None if sized else 2))
        if sized:
            threading.Thread(target=resize, daemon=True).start()

        def say(text: str) -> None:
            if text == "ready":
                ready.send(address(bound))

        serve(app, bound, grace=1, say=say, ready="ready")


class Clients:
    """What clients send and see, each in a thread. `seen` counts kinds; a status that is not due ends the run."""

    def __init__(self, address: str, bits: list[int], chance: random.Random) -> None:
        self.where, self.bits, self.chance = urllib.parse.urlsplit(address), bits, chance
        self.seen = Counter[str]()

    def one(self, _: object = None) -> None:
        kind = self.chance.choice(KINDS)
        getattr(self, kind)()
        self.seen[kind] += 1

    def body(self, **more: Any) -> dict[str, Any]:
        chance = self.chance
        words = " ".join(
            chance.choices(["def", "the", "x", "return", "in", "once", "a", "("], k=chance.randint(1, 120))
        )
        made = {"prompt": words, "max_tokens": chance.randint(1, 40), "temperature": chance.choice([0, 0.8])}
        if self.bits:
            made["bits"] = chance.choice(self.bits)
        return {**made, **more}

    @contextmanager
    def post(self, path: str, body: Any, due: int) -> Iterator[HTTPResponse]:
        with contextlib.closing(HTTPConnection(str(self.where.hostname), self.where.port or 80, timeout=120)) as made:
            made.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            reply = made.getresponse()
            if reply.status != due:
                raise SystemExit(f"{path} {str(body)[:500]} -> {reply.status}, not {due}: {reply.read()[:500]!r}")
            yield reply

    def answered(self, path: str, body: Any, due: int = 200) -> None:
        with self.post(path, body, due) as reply:
            json.loads(reply.read())

    def whole(self) -> None:
        self.answered("/v1/completions", self.body(n=2, logprobs=2))

    def chat(self) -> None:
        body = self.body()
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        self.answered("/v1/chat/completions", body)

    def tokens(self) -> None:
        self.answered("/tokenize", {"prompt": self.body()["prompt"]})

    def bad(self) -> None:
        self.answered("/v1/completions", self.body(temperature=-1), 400)

    def long(self) -> None:
        self.answered("/v1/completions", self.body(prompt="word " * 20_000), 400)

    def stream(self) -> None:
        with self.post("/v1/completions", self.body(stream=True), 200) as reply:
            events = [line for line in reply.read().decode().split("\n") if line]
        if events[-1] != "data: [DONE]" or any('"error"' in event for event in events):
            raise SystemExit(f"a stream ended in {events[-2:]}")

    def left(self) -> None:
        with self.post("/v1/completions", self.body(stream=True, max_tokens=300, ignore_eos=True), 200) as reply:
            for _ in range(self.chance.randint(0, 10)):
                reply.readline()


def soak(address: str, process: psutil.Process, count: int, args: argparse.Namespace) -> dict[str, Any]:
    memory, started = [], time.perf_counter()
    with urllib.request.urlopen(f"{address}/v1/models") as reply:
        cards = json.load(reply)["data"]
    clients = Clients(address, [card["bits"] for card in cards if card.get("bits")], random.Random(args.seed))
    with ThreadPoolExecutor(args.concurrency) as threads:
        for _ in range(10):
            list(threads.map(clients.one, range(count // 10)))
            memory.append(process.memory_info().rss)
    with urllib.request.urlopen(f"{address}/metrics") as reply:
        lines = [line.split(" ") for line in reply.read().decode().splitlines() if "tokens_by_bits_total{" in line]
    return {
        "requests": clients.seen.total(),
        "kinds": dict(clients.seen),
        "seconds": time.perf_counter() - started,
        "rss": memory,
        "last over second tenth": memory[-1] / memory[1],
        "tokens by bits": {name: float(value) for name, value in lines},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", help="a checkpoint to serve")
    for name, value in {"requests": 3000, "concurrency": 24, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    context, results = multiprocessing.get_context("spawn"), {}
    for name, sized in (("policy", False), ("resized", True)):
        here, there = context.Pipe()
        child = context.Process(target=run_server, args=(args.out, sized, there, args.seed))
        child.start()
        there.close()
        try:
            assert child.pid is not None
            address = here.recv()
            results[name] = soak(address, psutil.Process(child.pid), args.requests // 2, args)
        finally:
            child.terminate()
            child.join()
    settings = {key: value for key, value in vars(args).items() if key != "json"} | {"out": Path(args.out).name}
    text = json.dumps({"machine": describe(torch.get_num_threads()), "settings": settings, "result": results}, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
