"""What constraints cost a step of 8 replies: python benchmarks/constraints.py OUT [--bits 4] [--rounds 5] [--json FILE]

In turns, 8 free requests and 8 of the same prompts, length and settings that are held to a JSON schema: the median time
between two steps of each, and of the pairs' ratios. Greedy, and sampled. The last line is JSON.
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


def step_ms(engine: Engine, prompts: list[list[int]], **settings: object) -> float:
    """The median time from one step to the next while all of `prompts` are answered."""
    times: list[float] = []

    def note(event: object) -> None:
        if isinstance(event, Token):
            times.append(time.perf_counter())

    endless = settings.get("constraint") is None
    requests = [Request(ids, max_new_tokens=TOKENS, ignore_eos=endless, **settings) for ids in prompts]  # type: ignore[arg-type]
    handles = [engine.submit(request, note if index == 0 else None) for index, request in enumerate(requests)]
    for handle in handles:
        assert len(handle.result()) == TOKENS, "a reply ended early"
    steps = [after - before for before, after in pairwise(times)]
    return 1000 * statistics.median(steps[4:])


def main() -> None:
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
            free, held = (statistics.median(side) for side in zip(*pairs, strict=True))
            ratio = statistics.median(held / free for free, held in pairs)
            print(f"{name}: {free:.2f} ms free, {held:.2f} ms held, {ratio - 1:+.1%} (median of {len(pairs)} pairs)")
            found[name] = {"free_ms": free, "held_ms": held, "ratio": ratio, "ratios": [b / a for a, b in pairs]}
    text = json.dumps(found)
    if given.json is not None:
        given.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
