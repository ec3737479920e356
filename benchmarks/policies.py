"""What a precision policy buys under a bursty load: latency percentiles and quality, beside fixed bits.

The same requests arrive at the same times (open loop, benchmarks/arrivals.py) at an Engine, once for each way: all at
fixed bits, or at the highest with the lowest as min_bits under a policy. Rates are multiples of this machine's
capacity at the highest bits, measured first: requests a second with all places taken.

    python benchmarks/policies.py OUT|SHAPE [--text FILE] [--bits 2,3,4] [--reference MODEL]
        [--policies load load:prompts=1 position:tokens=8 entropy]
        [--seconds 60] [--calm 0.5] [--burst 1.5] [--calm-seconds 8] [--burst-seconds 4]
        [--max-requests 8] [--prompt 48] [--new 16-64] [--temperature 0.8] [--target 0.8] [--repeat 1]
        [--judged 64] [--blocks N] [--threads N] [--seed 0] [--json FILE]

OUT is a quantized checkpoint, its prompts openings of windows of --text; SHAPE (say llama-3.2-1b) a model of random
weights with prompts of random tokens, for latency only. `load` without a target gets --target times the time per
token with all places taken at the highest bits.

ttft: from arrival to the first token; tpot: mean time between a request's further tokens; latency: from arrival to
the last token. Arrival is the trace's time, not when the script got round to it.
kld: of the tokens as they were served: the produced sequences (of --judged requests) once more through the model, each
token at the bits that it ran at, against the same sequence at the highest bits or through --reference. Many rows at a
time, so CPUs use their arithmetic for prompts. A way is judged on what it said itself.
kld_histogram: the cheap estimate of the same: the kld of the fixed ways, weighted by the share of tokens at their bits.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from arrivals import bursts, lengths
from transformers import AutoModelForCausalLM, PreTrainedModel

import bitstrata
from bitstrata.benchmark.machine import describe
from bitstrata.benchmark.random_model import SHAPES, random_model, shape_config
from bitstrata.calibration import read_text
from bitstrata.metrics import Tally
from bitstrata.models import load_tokenizer
from bitstrata.plans import parse_bits
from bitstrata.runtime import Engine, Policy, Request, Token, parse_policy
from bitstrata.tables import render

HEAD_BITS = 8  # of random models: one row times a dense bf16 head takes torch seconds here, which would be all we see
PERCENTILES = (50, 95, 99)


@dataclass
class Served:
    """One request of the trace: when it comes, what it asks, and what it got."""

    arrival: float
    prompt: list[int]
    new: int
    seed: int
    tokens: list[Token] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of the tokens, seconds since the trace began

    @property
    def ttft(self) -> float:
        return self.times[0] - self.arrival

    @property
    def tpot(self) -> float:
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)

    @property
    def latency(self) -> float:
        return self.times[-1] - self.arrival


class Bench:
    def __init__(self, model: PreTrainedModel, args: argparse.Namespace, bits: tuple[int, ...]) -> None:
        self.model, self.args, self.bits = model, args, bits
        self.least, self.most = map(int, args.new.split("-"))
        self.room = args.max_requests * (args.prompt + self.most + 16)

    def engine(self, policy: Policy | None = None) -> Engine:
        places = self.args.max_requests
        return Engine(
            self.model,
            max_requests=places,
            max_batch_tokens=max(512, self.room),  # prompts are fed in one piece, and so at one precision
            cache_tokens=self.room,
            max_waiting=1 << 20,
            policy=policy,
        )

    def request(self, item: Served, bits: int, min_bits: int | None) -> Request:
        return Request(
            item.prompt, bits, min_bits, item.new, temperature=self.args.temperature, seed=item.seed, ignore_eos=True
        )

    def capacity(self, work: list[Served], bits: int) -> tuple[float, float]:
        """Requests a second with all places taken, and the time per token of a request then."""
        count = max(4 * self.args.max_requests, 16)
        some = [work[index % len(work)] for index in range(count)]
        with self.engine() as engine:
            for timed in (False, True):  # the first time warms up
                started = time.perf_counter()
                handles = [engine.submit(self.request(item, bits, None)) for item in some[: count if timed else 4]]
                paces = []
                for handle in handles:
                    handle.result()
                    paces.append(engine.stats().time_per_token)
        seconds = time.perf_counter() - started
        return count / seconds, statistics.median(pace for pace in paces if pace is not None)

    def serve(self, work: list[Served], bits: int, min_bits: int | None, policy: Policy | None) -> None:
        """Submit every request when it is due; fills in what each got."""
        with self.engine(policy) as engine:
            engine.submit(self.request(work[0], bits, None)).result()  # the engine's cache is made
            started = time.perf_counter()

            def listen(item: Served) -> Any:
                def listener(event: object) -> None:
                    if isinstance(event, Token):
                        item.tokens.append(event)
                        item.times.append(time.perf_counter() - started)

                return listener

            handles = []
            for item in work:
                time.sleep(max(0.0, started + item.arrival - time.perf_counter()))
                handles.append(engine.submit(self.request(item, bits, min_bits), listen(item)))
            for handle in handles:
                handle.result()

    def divergence(self, work: list[Served], reference: PreTrainedModel | None) -> float:
        """Mean KLD of the served tokens, nats a token, of `judged` requests that lie evenly in `work`."""
        tally = Tally()
        with torch.no_grad():
            for item in work[:: max(1, len(work) // self.args.judged)]:
                made, used = [token.id for token in item.tokens], [token.bits for token in item.tokens]
                prompt = len(item.prompt)  # at the bits that gave the first new token
                ids = torch.tensor([item.prompt + made[:-1]], device=self.model.device)
                row_bits = torch.tensor([[used[0]] * (prompt - 1) + used], dtype=torch.int8, device=ids.device)
                served = self.model(ids, bits=row_bits).logits[0, prompt - 1 :]
                exact = self.model(ids, bits=max(self.bits)) if reference is None else reference(ids)
                targets = torch.tensor(made, device=ids.device)
                tally.add(served, targets, exact.logits[0, prompt - 1 :].to(served.device))
        kld = tally.result().kld
        assert kld is not None
        return kld


def row_of(name: str, work: list[Served]) -> dict[str, Any]:
    bits = Counter(token.bits for item in work for token in item.tokens)
    total = sum(bits.values())
    row: dict[str, Any] = {"name": name, "requests": len(work), "tokens": total}
    for key in ("ttft", "tpot", "latency"):
        cuts = statistics.quantiles((getattr(item, key) for item in work), n=100, method="inclusive")
        row |= {f"{key}_p{percent}": cuts[percent - 1] for percent in PERCENTILES}
    row["mean_bits"] = sum(value * count for value, count in bits.items()) / total
    row["share_by_bits"] = {str(value): bits[value] / total for value in sorted(bits)}
    return row


def prompts_of(args: argparse.Namespace, model: PreTrainedModel, count: int) -> list[list[int]]:
    chance = random.Random(args.seed)
    if args.text is None:
        return [[chance.randrange(model.config.vocab_size) for _ in range(args.prompt)] for _ in range(count)]
    tokenizer = load_tokenizer(Path(args.model))
    ids: list[int] = []
    for document in read_text(args.text, part="text"):
        ids += tokenizer(document, add_special_tokens=False).input_ids
    starts = [chance.randrange(len(ids) - args.prompt) for _ in range(count)]
    return [ids[start : start + args.prompt] for start in starts]


def table(rows: list[dict[str, Any]]) -> str:
    columns = ["way", *(f"{key} p{p}" for key in ("ttft", "tpot", "latency") for p in PERCENTILES)]
    columns += ["bits", "kld", "from histogram"]
    cells = [
        [
            row["name"],
            *(
                f"{row[f'{key}_p{p}'] * 1000:.0f}" if key != "tpot" else f"{row[f'{key}_p{p}'] * 1000:.1f}"
                for key in ("ttft", "tpot", "latency")
                for p in PERCENTILES
            ),
            f"{row['mean_bits']:.2f}",
            *("" if row[key] is None else f"{row[key]:.4f}" for key in ("kld", "kld_histogram")),
        ]
        for row in rows
    ]
    return render("milliseconds", columns, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint, or one of " + ", ".join(SHAPES))
    parser.add_argument("--text")
    parser.add_argument("--bits", default="2,3,4")
    parser.add_argument("--policies", nargs="*", default=["load", "load:prompts=1", "position:tokens=8", "entropy"])
    parser.add_argument("--reference")
    rates = {"seconds": 60.0, "calm": 0.5, "burst": 1.5, "calm-seconds": 8.0, "burst-seconds": 4.0}
    for name, value in {**rates, "temperature": 0.8, "target": 0.8}.items():
        parser.add_argument(f"--{name}", type=float, default=value)
    for name, count in {"max-requests": 8, "prompt": 48, "repeat": 1, "seed": 0, "judged": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--new", default="16-64")
    parser.add_argument("--blocks", type=int, default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    bits = parse_bits(args.bits)
    high, low = max(bits), min(bits)
    if args.model in SHAPES:
        model = random_model(shape_config(args.model), bits, blocks=args.blocks, head_bits=HEAD_BITS)
    else:
        model = bitstrata.load(args.model, dtype=torch.float32)
        if args.text is None:
            parser.error("a checkpoint needs --text for its prompts")
    reference = None
    if args.reference is not None:
        reference = AutoModelForCausalLM.from_pretrained(args.reference, dtype=torch.float32)
    bench = Bench(model, args, bits)

    # capacity, with prompts and lengths as they will come
    count = 8 * args.max_requests
    sample = zip(prompts_of(args, model, count), lengths(count, bench.least, bench.most, seed=args.seed), strict=True)
    work = [Served(0.0, prompt, new, index) for index, (prompt, new) in enumerate(sample)]
    measured = {value: bench.capacity(work, value) for value in (high, low)}
    rate, pace = measured[high]
    for value, (capacity, seconds) in measured.items():
        print(f"capacity at {value} bits: {capacity:.2f} requests/s, {seconds * 1000:.1f} ms a token", file=sys.stderr)
    times = bursts(
        seconds=args.seconds,
        calm=args.calm * rate,
        burst=args.burst * rate,
        calm_seconds=args.calm_seconds,
        burst_seconds=args.burst_seconds,
        seed=args.seed,
    )
    if len(times) < 2:
        parser.error(f"{len(times)} requests come in {args.seconds:g} s at this machine's speed: give more --seconds")
    prompts = prompts_of(args, model, len(times))
    news = lengths(len(times), bench.least, bench.most, seed=args.seed)

    def fresh() -> list[Served]:
        items = zip(times, prompts, news, strict=True)
        return [Served(at, prompt, new, index) for index, (at, prompt, new) in enumerate(items)]

    ways: dict[str, tuple[int, int | None, str]] = {f"fixed {value}": (value, None, "fixed") for value in bits}
    for text in args.policies:
        name, _, settings = text.partition(":")
        if name == "load" and "target_ms" not in settings:
            text = f"load:target_ms={args.target * pace * 1000:.4g}" + (f",{settings}" if settings else "")
        ways[text] = (high, low, text)
    served: dict[str, list[Served]] = {name: [] for name in ways}
    for _ in range(args.repeat):
        for name, (value, min_bits, text) in ways.items():
            work = fresh()
            bench.serve(work, value, min_bits, parse_policy(text))
            served[name] += work
            print(f"{name}: {len(work)} requests", file=sys.stderr)

    rows = []
    for name in ways:
        row = row_of(name, served[name])
        row["kld"] = None if args.model in SHAPES else bench.divergence(served[name], reference)
        rows.append(row)
    by_bits = {str(value): row["kld"] for value, row in zip(bits, rows, strict=False)}
    for row in rows:
        shares = row["share_by_bits"].items()
        exact = row["kld"] is not None and row["share_by_bits"].keys() <= by_bits.keys()
        row["kld_histogram"] = sum(share * by_bits[value] for value, share in shares) if exact else None
    print(table(rows), file=sys.stderr)
    settings_used = {key: value for key, value in vars(args).items() if key != "json"} | {
        "model": Path(args.model).name,
        "text": args.text and Path(args.text).name,
        "reference": args.reference and Path(args.reference).name,
    }
    report = {
        "machine": describe(torch.get_num_threads()),
        "settings": settings_used,
        "capacity": {
            str(value): {"requests_per_second": count, "time_per_token": seconds}
            for value, (count, seconds) in measured.items()
        },
        "trace": {"requests": len(times), "seconds": args.seconds},
        "ways": rows,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
