"""What constraints cost a step of 8 replies: python benchmarks/constraints.py OUT [--bits 4] [--rounds 5] [--json FILE]

In turns, 8 free requests and 8 of the same prompts, length and settings that are held to a JSON schema: the median time
between two steps of each, and of it the time in which the 8 tokens are picked, masks included; the share is what is
picked longer, of a free step. Greedy, and sampled. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch

import bitstrata
from bitstrata import Constraint, Engine, Request
from bitstrata.models import encode_turns, load_tokenizer, resolve
from bitstrata.runtime import Token
from bitstrata.runtime.batching import engine as engine_module
from bitstrata.runtime.batching.continuation import pick

ROWS, TOKENS = 8, 40
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["music", "books", "sports"]}, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
# a list that no reply here can finish, so that all rows run to the end
HELD = Constraint.json_schema({"type": "array", "items": PERSON, "minItems": 1000})


def step_ms(engine: Engine, prompts: list[list[int]], **settings: object) -> tuple[float, float]:
    """The median time from one step to the next while all of `prompts` are answered, and the mean of picking."""
    times: list[float] = []
    picking.clear()

    def note(event: object) -> None:
        if isinstance(event, Token):
            times.append(time.perf_counter())

    endless = settings.get("constraint") is None
    requests = [Request(ids, max_new_tokens=TOKENS, ignore_eos=endless, **settings) for ids in prompts]  # type: ignore[arg-type]
    handles = [engine.submit(request, note if index == 0 else None) for index, request in enumerate(requests)]
    for handle in handles:
        assert len(handle.result()) == TOKENS, "a reply ended early"
    steps = [after - before for before, after in pairwise(times)]
    return 1000 * statistics.median(steps[4:]), 1000 * statistics.mean(picking[5:])


picking: list[float] = []  # seconds of each step


def timed_pick(*given: object) -> object:
    started = time.perf_counter()
    found = pick(*given)  # type: ignore[arg-type]
    picking.append(time.perf_counter() - started)
    return found


def main() -> None:
    engine_module.pick = timed_pick  # type: ignore[assignment]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model, tokenizer = bitstrata.load(given.model), load_tokenizer(resolve(given.model))
    prompts = [
        encode_turns(tokenizer, [{"role": "user", "content": f"Describe person {index} as JSON."}])
        for index in range(ROWS)
    ]
    found: dict[str, object] = {
        "model": Path(given.model).name, "bits": given.bits, "threads": torch.get_num_threads(), "rows": ROWS,
    }  # fmt: skip
    with Engine(model, tokenizer, max_requests=ROWS, reuse="off") as engine:
        found["vocabulary"] = engine.limits.vocabulary
        for name, temperature in (("greedy", 0.0), ("sampled", 0.7)):
            settings = {"bits": given.bits, "temperature": temperature, "seed": 1}
            step_ms(engine, prompts, **settings), step_ms(engine, prompts, constraint=HELD, **settings)
            pairs = []
            for index in range(given.rounds):
                pair = {}
                for held in (False, True) if index % 2 else (True, False):
                    pair[held] = step_ms(engine, prompts, constraint=HELD if held else None, **settings)
                pairs.append((pair[False], pair[True]))
            (free, free_pick), (held, held_pick) = (
                tuple(map(statistics.median, zip(*side, strict=True))) for side in zip(*pairs, strict=True)
            )
            share = (held_pick - free_pick) / free
            print(
                f"{name}: a step takes {free:.2f} ms free, {held:.2f} ms held (medians of {len(pairs)}); "
                f"picking {free_pick:.3f} ms free, {held_pick:.3f} ms held: {share:+.1%} of a free step"
            )
            found[name] = {
                "free_ms": free, "held_ms": held, "free_pick_ms": free_pick, "held_pick_ms": held_pick, "share": share,
                "ratios": [after[0] / before[0] for before, after in pairs],
            }  # fmt: skip
    text = json.dumps(found)
    if given.json is not None:
        given.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
