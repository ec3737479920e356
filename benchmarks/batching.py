"""What common batches bring: the same requests through an Engine at mixed bits, at uniform bits, and one by one.

Every way serves the same prompts for the same number of new tokens; the ways take turns, and the
ratios are of their medians within one run. `one by one` is `model.generate(bits=...)`, request after request.

    python benchmarks/batching.py OUT|SHAPE [--bits 2,3,4] [--requests 32] [--prompt 64] [--new 48]
        [--max-requests 16] [--blocks N] [--repeat 3] [--threads N] [--seed 0] [--json FILE]

OUT is a quantized checkpoint; SHAPE (say llama-3.2-1b) a model of random weights, of `--blocks` decoder blocks.
Prompts are random tokens of half to one and a half times `--prompt`. Tokens are compared as well: `identical` is the
share of requests whose tokens are those of generate.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

import bitstrata
from bitstrata.benchmark.machine import describe
from bitstrata.benchmark.random_model import SHAPES, random_model, shape_config
from bitstrata.nn import bits_state
from bitstrata.plans import parse_bits
from bitstrata.runtime import Engine, Request

HEAD_BITS = 8  # of random models: one row times a dense bf16 head takes torch seconds here, which would be all we see
Work = list[tuple[list[int], int]]  # prompt and bits


def one_by_one(model: PreTrainedModel, work: Work, new: int) -> list[list[int]]:
    results = []
    for prompt, bits in work:
        ids = torch.tensor([prompt])
        settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), bits=bits, **settings)  # type: ignore[operator]
        results.append(output[0, len(prompt) :].tolist())
    return results


def together(engine: Engine, work: Work, new: int) -> list[list[int]]:
    handles = [engine.submit(Request(prompt, bits=bits, max_new_tokens=new, ignore_eos=True)) for prompt, bits in work]
    return [handle.result() for handle in handles]


def measure(model: PreTrainedModel, works: dict[str, Work], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """name -> seconds (median), tokens a second, and ratios; the ways take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ["one by one", *works]}
    identical = 0.0
    for _ in range(args.repeat):
        started = time.perf_counter()
        expected = one_by_one(model, works["mixed"], args.new)
        seconds["one by one"].append(time.perf_counter() - started)
        room = args.max_requests * (2 * args.prompt + args.new + 16)
        with Engine(model, max_requests=args.max_requests, cache_tokens=room) as engine:
            for name, work in works.items():
                started = time.perf_counter()
                results = together(engine, work, args.new)
                seconds[name].append(time.perf_counter() - started)
                if name == "mixed":
                    same = [result == alone for result, alone in zip(results, expected, strict=True)]
                    identical = sum(same) / len(same)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = args.new * args.requests
    uniform = statistics.mean(value for name, value in median.items() if name.startswith("uniform"))
    rows: dict[str, dict[str, float]] = {}
    for name, value in median.items():
        rows[name] = {
            "seconds": value,
            "spread": max(seconds[name]) / min(seconds[name]),
            "tok_s": tokens / value,
            "ratio_one_by_one": median["one by one"] / value,
        }
    rows["mixed"] |= {"ratio_mean_uniform": uniform / median["mixed"], "identical": identical}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a checkpoint, or one of " + ", ".join(SHAPES))
    parser.add_argument("--bits", default="2,3,4")
    for name, value in {"requests": 32, "prompt": 64, "new": 48, "max-requests": 16, "repeat": 3, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--blocks", type=int, default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    bits = parse_bits(args.bits)
    if args.model in SHAPES:
        model = random_model(shape_config(args.model), bits, blocks=args.blocks, head_bits=HEAD_BITS)
    else:
        model = bitstrata.load(args.model, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # every request makes all its tokens
    assert set(bits) <= set(bits_state(model).supported)

    chance = random.Random(args.seed)
    prompts = [
        [
            chance.randrange(model.config.vocab_size)
            for _ in range(chance.randint(args.prompt // 2, args.prompt * 3 // 2))
        ]
        for _ in range(args.requests)
    ]
    works = {"mixed": [(prompt, bits[index % len(bits)]) for index, prompt in enumerate(prompts)]}
    works |= {f"uniform {value}": [(prompt, value) for prompt in prompts] for value in bits}
    rows = measure(model, works, args)
    for name, row in rows.items():
        print(
            f"{name:12} {row['tok_s']:9.1f} tok/s  {row['ratio_one_by_one']:5.2f}x one by one  "
            f"spread {row['spread']:.2f}",
            file=sys.stderr,
        )
    settings = {key: value for key, value in vars(args).items() if key != "json"} | {"model": Path(args.model).name}
    report = {"machine": describe(torch.get_num_threads()), "settings": settings, "ways": rows}
    text = json.dumps(report, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
