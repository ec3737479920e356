"""What transformers' `generate` makes of our model: python vllm_reference.py CASES.json, answers to stdout.

A process of its own, so that the kernel can be chosen for it: a server computes in float32 with the exact one whatever
the number of rows, since its batches change.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import bitstrata
from bitstrata.plans import Plan


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    model = bitstrata.load(asked["model"], dtype=torch.float32)
    plans = {name: Plan.load(file) for name, file in asked["plans"].items()}
    answers = []
    for prompt, bits in asked["cases"]:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                bits=plans.get(bits, bits),
                do_sample=False,
                max_new_tokens=asked["count"],
                min_new_tokens=asked["count"],
                eos_token_id=None,
                pad_token_id=0,
            )
        answers.append(made[0, len(prompt) :].tolist())
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
