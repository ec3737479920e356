"""Throughput and memory of running servers, ours and vLLM's: 32 requests at once, in turns.

Starts nothing: name servers that are up, each with the process that was started for it, so that one measures what one
started, and where. A target is NAME=URL[@BITS][#PID]; BITS goes with each request, as vLLM's plugin takes it and as
ours does.

    vllm serve OUT --dtype bfloat16 --enforce-eager --port 8201 --hf-overrides '{"bitstrata": {"max_bits": 2}}' &
    vllm serve ORIGINAL --dtype bfloat16 --enforce-eager --port 8202 &
    bitstrata serve OUT --bits 2 --port 8203 &
    python benchmarks/vllm_throughput.py plugin-2=http://127.0.0.1:8201#PID bf16=http://127.0.0.1:8202#PID
        ours-2=http://127.0.0.1:8203#PID [--requests 32] [--prompt 32] [--new 24] [--rounds 3] [--json FILE]

Prints tokens a second of each, the median of the rounds, as a ratio of the first target's, and the memory that its
processes have for themselves (USS), in bytes. Prompts are random tokens, each server's the same.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil

TARGET = re.compile(r"(?P<name>[^=]+)=(?P<url>https?://[^@#]+)(@(?P<bits>\d+))?(#(?P<pid>\d+))?")


@dataclass
class Target:
    name: str
    url: str
    bits: int | None
    pid: int | None
    speeds: list[float] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str) -> Target:
        found = TARGET.fullmatch(text)
        if found is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=URL[@BITS][#PID]")
        numbers = {key: int(found[key]) if found[key] else None for key in ("bits", "pid")}
        return cls(found["name"], found["url"].rstrip("/"), **numbers)

    def model(self) -> str:
        with urllib.request.urlopen(f"{self.url}/v1/models", timeout=60) as answer:
            name: str = json.load(answer)["data"][0]["id"]
        return name

    def ask(self, model: str, prompt: str, count: int) -> int:
        """Tokens that one request got."""
        body = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        if self.bits is not None:
            body |= {"vllm_xargs": {"bits": self.bits}}
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/v1/completions", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            made: int = json.load(answer)["usage"]["completion_tokens"]
        return made

    def run(self, prompts: list[str], count: int) -> None:
        model = self.model()
        began = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            made = sum(pool.map(lambda prompt: self.ask(model, prompt, count), prompts))
        self.speeds.append(made / (time.perf_counter() - began))

    def memory(self) -> int | None:
        if self.pid is None:
            return None
        first = psutil.Process(self.pid)
        return sum(one.memory_full_info().uss for one in (first, *first.children(recursive=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", type=Target.parse)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=32, help="words of a prompt")
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    draw = random.Random(0)
    words = Path(__file__).read_text(encoding="utf-8").split()
    for number in range(options.rounds):
        prompts = [" ".join(draw.choices(words, k=options.prompt)) for _ in range(options.requests)]
        for target in options.targets if number % 2 == 0 else reversed(options.targets):
            target.run(prompts, options.new)
    first = statistics.median(options.targets[0].speeds)
    rows = []
    for target in options.targets:
        speed, memory = statistics.median(target.speeds), target.memory()
        spread = (max(target.speeds) - min(target.speeds)) / speed
        rows.append(
            {"name": target.name, "tokens_s": speed, "spread": spread, "ratio": speed / first, "uss_bytes": memory}
        )
        room = "" if memory is None else f"  {memory / 2**20:7.0f} MiB"
        print(f"{target.name:16} {speed:8.1f} tokens/s  +-{spread:4.0%}  {speed / first:5.2f}x{room}")
    if options.json:
        options.json.write_text(json.dumps({"options": vars(options) | {"targets": None, "json": None}, "rows": rows}))


if __name__ == "__main__":
    main()
