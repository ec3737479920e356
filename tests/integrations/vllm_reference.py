"""What transformers' `generate` makes of our models: python vllm_reference.py ASKED.json, answers to stdout.

A process of its own, so that the kernel can be chosen for it: a server computes in float32 with the exact one whatever
the number of rows, since its batches change.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

import bitstrata
from bitstrata.plans import Plan

Cases = Sequence[tuple[Sequence[int], int | str | None]]  # prompts, and the bits of each, or the name of a plan


def expected_tokens(
    models: Mapping[str, tuple[Path, Cases]],
    count: int,
    folders: pytest.TempPathFactory,
    plans: Mapping[str, Path] | None = None,
) -> dict[str, list[list[int]]]:
    """The `count` tokens of each of the cases of these models, greedily."""
    from bitstrata.integrations.vllm.parameters import steady_kernel

    path = folders.mktemp("asked") / "asked.json"
    asked = {name: {"model": str(model), "cases": cases} for name, (model, cases) in models.items()}
    named = {name: str(file) for name, file in (plans or {}).items()}
    path.write_text(json.dumps({"models": asked, "count": count, "plans": named}))
    kernel = steady_kernel("cpu", torch.float32) or "reference"
    env = {**os.environ, "BITSTRATA_KERNEL": kernel, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, __file__, str(path)]
    done = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True, env=env)
    answers: dict[str, list[list[int]]] = json.loads(done.stdout)
    return answers


def generated(folder: str, cases: Cases, count: int, plans: Mapping[str, Plan]) -> list[list[int]]:
    model = bitstrata.load(folder, dtype=torch.float32)
    answers = []
    for prompt, bits in cases:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                bits=plans[bits] if isinstance(bits, str) else bits,
                do_sample=False,
                max_new_tokens=count,
                min_new_tokens=count,
                eos_token_id=None,
                pad_token_id=0,
            )
        answers.append(made[0, len(prompt) :].tolist())
    return answers


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    named = {name: Plan.load(file) for name, file in given["plans"].items()}
    found = {
        name: generated(one["model"], one["cases"], given["count"], named) for name, one in given["models"].items()
    }
    json.dump(found, sys.stdout)
