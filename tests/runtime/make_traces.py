"""Make what the policy tests replay: `python tests/runtime/make_traces.py arrivals` or `entropies CHECKPOINT TEXT`.

arrivals    when requests come, and how many new tokens each makes: calm and bursts take turns
            (benchmarks/arrivals.py), with the parameters below
entropies   normalised entropies of a real model's own tokens, sampled by an Engine at its highest bits. The file
            in traces/ is of pycode-5m (nested, 2-8 bits) on its held-out text.

The files are kept, so that the tests do not depend on any generator of random numbers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TRACES = Path(__file__).parent / "traces"
ARRIVALS = {"seconds": 60.0, "calm": 3.0, "burst": 16.0, "calm_seconds": 8.0, "burst_seconds": 4.0, "seed": 6}
NEW_TOKENS = (8, 48)
PROMPTS, PROMPT, NEW, TEMPERATURE = 6, 32, 96, 0.8


def arrivals() -> dict:
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from arrivals import bursts, lengths

    times = bursts(**ARRIVALS)
    new = lengths(len(times), *NEW_TOKENS, seed=ARRIVALS["seed"])
    return {
        "made_by": "make_traces.py arrivals",
        "parameters": {**ARRIVALS, "new_tokens": NEW_TOKENS},
        "arrivals": [[round(time, 3), count] for time, count in zip(times, new, strict=True)],
    }


def entropies(checkpoint: str, text: str) -> dict:
    import torch

    import bitstrata
    from bitstrata.models import load_tokenizer
    from bitstrata.runtime import Engine, EntropyPolicy, Request

    class Recorder(EntropyPolicy):
        """Notes what it is shown before each token, nothing before the first, and lowers no bits."""

        def start(self):
            seen = []
            recorded.append(seen)
            return lambda request: seen.append(request.entropy) or 0

    recorded: list[list] = []
    model = bitstrata.load(checkpoint, dtype=torch.float32)
    ids = load_tokenizer(Path(checkpoint)).encode(Path(text).read_text(), add_special_tokens=False)
    stride = len(ids) // PROMPTS
    with Engine(model, policy=Recorder()) as engine:
        for index in range(PROMPTS):
            prompt = ids[index * stride : index * stride + PROMPT]
            request = Request(prompt, min_bits=2, max_new_tokens=NEW, temperature=TEMPERATURE, seed=index)
            engine.submit(request).result()
    return {
        "made_by": "make_traces.py entropies",
        "parameters": {"model": "pycode-5m", "bits": 8, "prompt": PROMPT, "new": NEW, "temperature": TEMPERATURE},
        "entropies": [[round(value, 4) for value in sequence[1:]] for sequence in recorded],
    }


if __name__ == "__main__":
    kind, *paths = sys.argv[1:]
    trace = {"arrivals": arrivals, "entropies": entropies}[kind](*paths)
    TRACES.mkdir(exist_ok=True)
    (TRACES / f"{kind}.json").write_text(json.dumps(trace) + "\n")
