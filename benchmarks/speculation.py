"""What does drafting at few bits bring?

Generates continuations of held-out text greedily at `bits`, plainly and with drafts at `draft_bits`,
in turns, and prints the share of accepted drafts, the length of drafts chosen, and the speed as a
ratio of medians. Results go to a JSON file with machine, versions and settings.

    python benchmarks/speculation.py OUT --text TEXT [--pairs 4:2,8:2,8:3] [--draft-tokens 4]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import bitstrata
from bitstrata.calibration import read_text
from bitstrata.models import load_tokenizer
from bitstrata.tables import render


def prompts_of(tokenizer: object, text: str, count: int, length: int) -> list[torch.Tensor]:
    """Openings of documents: int64 [1, length] each."""
    found = []
    for document in read_text(text, part="text"):
        ids = tokenizer(document, return_tensors="pt", add_special_tokens=False).input_ids[:, :length]  # type: ignore[operator]
        if ids.shape[1] == length:
            found.append(ids)
        if len(found) == count:
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--text", required=True)
    parser.add_argument("--pairs", default="4:2,8:2,8:3")
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output")
    arguments = parser.parse_args()
    model = bitstrata.load(arguments.checkpoint, dtype=getattr(torch, arguments.dtype), device=arguments.device)
    tokenizer = load_tokenizer(Path(arguments.checkpoint))
    prompts = prompts_of(tokenizer, arguments.text, arguments.prompts, arguments.prompt_length)
    settings = {"max_new_tokens": arguments.tokens, "do_sample": False, "eos_token_id": None}
    rows = []
    for pair in arguments.pairs.split(","):
        bits, draft_bits = map(int, pair.split(":"))
        plain, drafted, counted = [], [], {"drafted": 0, "accepted": 0, "cycles": 0, "plain": 0, "tokens": 0}
        same = 0
        for prompt in prompts:
            prompt = prompt.to(model.device)
            began = time.perf_counter()
            one = model.generate(prompt, bits=bits, **settings)
            middle = time.perf_counter()
            other = model.generate(
                prompt, bits=bits, draft_bits=draft_bits, draft_tokens=arguments.draft_tokens, **settings
            )
            ended = time.perf_counter()
            plain.append(middle - began)
            drafted.append(ended - middle)
            same += bool(torch.equal(one, other))
            for key in counted:
                counted[key] += getattr(model.speculation, key)
        rows.append(
            {
                "bits": bits,
                "draft_bits": draft_bits,
                "acceptance": counted["accepted"] / max(1, counted["drafted"]),
                "drafted_a_cycle": counted["drafted"] / max(1, counted["cycles"]),
                "plain_share": counted["plain"] / max(1, counted["tokens"]),
                "same_texts": same / len(prompts),
                "tokens_per_second": arguments.tokens / statistics.median(plain),
                "speed_ratio": statistics.median(plain) / statistics.median(drafted),
            }
        )
    columns = ["bits", "draft", "accepted", "drafted a cycle", "plain steps", "same texts", "plain tok/s", "speed"]
    table = [
        [
            str(row["bits"]), str(row["draft_bits"]), f"{row['acceptance']:.1%}", f"{row['drafted_a_cycle']:.2f}",
            f"{row['plain_share']:.0%}", f"{row['same_texts']:.0%}", f"{row['tokens_per_second']:.1f}",
            f"{row['speed_ratio']:.2f}x",
        ]
        for row in rows
    ]  # fmt: skip
    print(render(f"{arguments.checkpoint}: {arguments.dtype} on {model.device}", columns, table))
    if arguments.output:
        result = {
            "settings": {**vars(arguments), "checkpoint": Path(arguments.checkpoint).name},
            "environment": bitstrata.env().to_json(),
            "rows": rows,
        }
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
