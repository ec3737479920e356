"""What keys and values in int8 and int4 cost and bring, beside those in the model's dtype.

    python benchmarks/cache_types.py OUT --text FILE [--reference MODEL] [--bits 4,2] [--skip speed] [--output FILE]

Two tables:

* **quality**, in float32 and exact arithmetic: a held-out text in windows, read in chunks of 16 tokens, each by one
  native call where the model has it; every token reads what the cache kept. KLD and top-1 agreement of all tokens'
  logits: `kld` to the same planes with a float32 cache, which is what the cache costs; `to original` of the planes with
  this cache to the original model in float32, given --reference.
* **speed**, in bf16: tokens a second of one text by the session that `generate` uses, after `--histories` tokens, kinds
  taking turns. Bytes are those of one token's keys and values.

Results go to a JSON file with machine, versions and settings; tables that it has already and that were left out stay.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import bitstrata
from bitstrata.benchmark.machine import describe
from bitstrata.calibration import read_text
from bitstrata.kernels.cached import BITS
from bitstrata.models import load_tokenizer
from bitstrata.nn import bits_state
from bitstrata.runtime.batching import Sampler, session_of
from bitstrata.runtime.batching.attention import Span
from bitstrata.runtime.batching.forward import Forward
from bitstrata.runtime.batching.memory import TokenPool
from bitstrata.tables import render

CHUNK = 16  # tokens of one native call
KINDS = tuple(BITS)


@dataclass
class Reader:
    """A model with a cache of one kind for one text at a time."""

    model: PreTrainedModel
    kind: str
    forward: Forward

    @classmethod
    def of(cls, model: PreTrainedModel, kind: str, tokens: int) -> Reader:
        forward = Forward(model, TokenPool(tokens, kind))
        forward.check()
        forward.detach()
        return cls(model, kind, forward)

    def read(self, text: list[int], bits: int) -> Tensor:
        """Log-probabilities [tokens, V] after each token of `text`; CHUNK of them in each call."""
        state, rows = bits_state(self.model), []
        assigned, pool = state.resolve(bits), self.forward.pool
        start = pool.reserve(len(text))
        assert start is not None
        self.forward.attach()
        try:
            with state.using(arithmetic="exact"):
                for first in range(0, len(text), CHUNK):
                    part = text[first : first + CHUNK]  # a span each, so that all have logits
                    spans = [Span(start.start, first + at, 1) for at in range(len(part))]
                    rows.append(self.forward.run([[token] for token in part], spans, [assigned] * len(part)))
        finally:
            self.forward.detach()
            pool.release(start)
        return torch.cat(rows).log_softmax(-1)


def divergence(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """Mean KLD, and the share of equal most likely tokens."""
    kld = (expected.exp() * (expected - found)).sum(-1).mean()
    return float(kld), float((expected.argmax(-1) == found.argmax(-1)).float().mean())


@torch.no_grad()
def quality(ids: list[int], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    length = arguments.length
    model, original = bitstrata.load(arguments.checkpoint, dtype=torch.float32), None
    if arguments.reference:
        original = AutoModelForCausalLM.from_pretrained(arguments.reference, dtype=torch.float32)
    readers = [Reader.of(model, kind, length) for kind in KINDS]
    found: dict[tuple[int, str], list[list[float]]] = {}
    for text in (ids[first : first + length] for first in range(0, arguments.windows * length, length)):
        target = None if original is None else original(torch.tensor([text])).logits[0].log_softmax(-1)
        for bits in arguments.bits:
            expected = None
            for reader in readers:
                logs = reader.read(text, bits)
                expected = logs if expected is None else expected
                values = [*divergence(expected, logs), *(() if target is None else divergence(target, logs))]
                found.setdefault((bits, reader.kind), []).append(values)
                print(bits, reader.kind, values, flush=True)
    names = ("kld", "top1_agreement", "kld_to_original", "top1_agreement_to_original")
    sizes = {reader.kind: reader.forward.pool.bytes // reader.forward.pool.tokens for reader in readers}
    return [
        {
            "bits": bits,
            "cache": kind,
            "float32_bytes_per_token": sizes[kind],
            **dict(zip(names, torch.tensor(values).mean(0).tolist(), strict=False)),
        }
        for (bits, kind), values in found.items()
    ]


def speed(ids: list[int], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One model a kind, as a model keeps one session."""
    models = {kind: bitstrata.load(arguments.checkpoint, dtype=torch.bfloat16) for kind in KINDS}
    samples: dict[tuple[int, int, str], list[float]] = {}
    sizes: dict[str, int] = {}
    for bits in arguments.bits:
        for history in arguments.histories:
            for _ in range(arguments.rounds):
                for kind, model in models.items():
                    with session_of(model, kind) as own:
                        assigned = bits_state(model).resolve(bits)
                        item = own.start(ids[:history], assigned, most=4096, sampler=Sampler(0.0, 1.0, Random(0)))
                        own.step(item, assigned)
                        own.step(item, assigned)
                        started = time.perf_counter()
                        for _ in range(arguments.tokens):
                            own.step(item, assigned)
                        seconds = time.perf_counter() - started
                        own.finish(item)
                        sizes[kind] = own._pool.bytes // own._pool.tokens
                    samples.setdefault((bits, history, kind), []).append(arguments.tokens / seconds)
    return [
        {
            "bits": bits,
            "history": history,
            "cache": kind,
            "bytes_per_token": sizes[kind],
            "tokens_per_second": statistics.median(speeds),
            "samples": speeds,
        }
        for (bits, history, kind), speeds in samples.items()
    ]


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--text", required=True)
    parser.add_argument("--reference", help="the original model")
    parser.add_argument("--bits", type=numbers, default=[4, 2])
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--histories", type=numbers, default=[32, 2000])
    parser.add_argument("--tokens", type=int, default=32, help="timed in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--skip", choices=["quality", "speed"], help="leave one of the two tables out")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    text = "\n".join(read_text(arguments.text, part="text"))
    tokenizer = load_tokenizer(Path(arguments.checkpoint))
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    tables: dict[str, Any] = {}
    if arguments.skip != "quality":
        tables["quality"] = quality(ids, arguments)
    if arguments.skip != "speed":
        tables["speed"] = speed(ids, arguments)
    for name, rows in tables.items():
        columns = [column for column in rows[0] if column != "samples"]
        cells = [
            [f"{row[one]:.5f}" if isinstance(row[one], float) else str(row[one]) for one in columns] for row in rows
        ]
        print(render(name, columns, cells))
    if arguments.output:
        known = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        settings = {key: value for key, value in vars(arguments).items() if key not in ("output", "skip")}
        for key in ("checkpoint", "text", "reference"):
            settings[key] = settings[key] and Path(settings[key]).name
        machine = describe(torch.get_num_threads(), torch.device("cpu"))
        for name, rows in tables.items():
            known[name] = {"settings": settings, "machine": machine, "rows": rows}
        arguments.output.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
