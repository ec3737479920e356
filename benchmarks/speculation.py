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
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import PreTrainedTokenizerBase

import bitstrata
from bitstrata.calibration import read_text
from bitstrata.models import load_tokenizer
from bitstrata.nn import bits_state
from bitstrata.runtime import GenerationSettings, continue_tokens
from bitstrata.tables import render


def prompts_of(tokenizer: PreTrainedTokenizerBase, text: str, count: int, length: int) -> list[list[int]]:
    """Openings of documents, `length` tokens each."""
    found = []
    for document in read_text(text, part="text"):
        ids = tokenizer.encode(document, add_special_tokens=False)[:length]
        if len(ids) == length:
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
    continue_tokens(
        model, tokenizer, prompts[0], "", bits=bits_state(model).default, settings=GenerationSettings(2)
    )  # makes the session
    rows = []
    for pair in arguments.pairs.split(","):
        bits, draft_bits = map(int, pair.split(":"))
        plain, drafted, counted = [], [], {"drafted": 0, "accepted": 0, "cycles": 0, "plain": 0, "tokens": 0}
        same = 0
        settings = {"bits": bits, "reuse": "off"}
        for prompt in prompts:
            one = continue_tokens(
                model, tokenizer, prompt, "", **settings, settings=GenerationSettings(arguments.tokens)
            )
            drafting = GenerationSettings(arguments.tokens, draft_bits=draft_bits, draft_tokens=arguments.draft_tokens)
            other = continue_tokens(model, tokenizer, prompt, "", **settings, settings=drafting)
            plain.append(one.seconds / one.tokens)
            drafted.append(other.seconds / other.tokens)
            same += one.text == other.text
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
                "tokens_per_second": 1 / statistics.median(plain),
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
