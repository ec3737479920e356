"""What constraints cost, and whether they hold: python benchmarks/constraints.py OUT [--bits 4] [--requests 20]

Requests at several bits in mixed batches fill a JSON schema: how many of the replies are valid. Then the mask alone, of
one token of one reply, against the time of a step with 8 replies. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

import bitstrata
from bitstrata import Constraint, Engine, Request
from bitstrata.models import encode_turns, load_tokenizer, resolve
from bitstrata.runtime.batching.masks import Mask

ROWS = 8
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["music", "books", "sports"]}, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}


def is_valid(text: str) -> bool:
    try:
        read = json.loads(text)
    except ValueError:
        return False
    likes = read["likes"]
    return list(read) == list(SCHEMA["properties"]) and len(likes) <= 3 and type(read["age"]) is int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--requests", type=int, default=20)
    given = parser.parse_args()
    model, tokenizer = bitstrata.load(given.model), load_tokenizer(resolve(given.model))
    spent: list[float] = []
    inner = Mask.__call__

    def timed(mask, tokens, logits):
        started = time.perf_counter()
        masked = inner(mask, tokens, logits)
        spent.append(time.perf_counter() - started)
        return masked

    Mask.__call__ = timed  # type: ignore[method-assign]
    constraint = Constraint.json_schema(SCHEMA)
    with Engine(model, tokenizer, max_requests=ROWS) as engine:
        lowest = min(engine.limits.state.supported)
        handles = []
        for index in range(given.requests):
            turns = [{"role": "user", "content": f"Describe person {index} as JSON."}]
            request = Request(
                encode_turns(tokenizer, turns), given.bits, max_new_tokens=200, temperature=0.7, seed=index,
                constraint=constraint,
            )  # fmt: skip
            handles.append(engine.submit(request))
            free = Request(request.prompt_ids, lowest, max_new_tokens=20, ignore_eos=True)
            engine.submit(free)
        texts = [tokenizer.decode(handle.result(), skip_special_tokens=True) for handle in handles]
        valid = sum(map(is_valid, texts))
        masks = [1000 * seconds for seconds in spent]

        free = [
            engine.submit(Request([1 + index] * 32, given.bits, max_new_tokens=96, ignore_eos=True))
            for index in range(ROWS)
        ]
        while not all(handle.tokens for handle in free):
            time.sleep(0.01)
        before, started = engine.stats().batches, time.perf_counter()
        for handle in free:
            handle.result()
        step = 1000 * (time.perf_counter() - started) / max(1, engine.stats().batches - before)
    mask = statistics.median(masks)
    found = {
        "model": given.model, "bits": given.bits, "threads": torch.get_num_threads(),
        "vocabulary": engine.limits.vocabulary, "valid": valid, "requests": given.requests, "mask_ms": mask,
        "mask_ms_mean": statistics.mean(masks), "step_ms": step, "rows": ROWS,
        "share": ROWS * statistics.mean(masks) / step,
    }  # fmt: skip
    print(f"{valid} of {given.requests} replies are valid; e.g. {texts[0]!r}")
    print(
        f"a mask takes {mask:.3f} ms (mean {found['mask_ms_mean']:.3f}), "
        f"{ROWS} of them {found['share']:.1%} of a step of {step:.1f} ms"
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
