"""The process holds what the plan says, and what is dropped goes back to the system."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from page_orders import write_order
from transformers import LlamaConfig

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
random_checkpoint = runpy.run_path(str(SCRIPTS / "common.py"))["random_checkpoint"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")

SCRIPT = """
import gc, random, re, sys
import torch
import bitstrata
from bitstrata.checkpoint import CheckpointReader
from bitstrata.plans import ModelSizes
from bitstrata.nn import bits_state

def anonymous():
    gc.collect()
    return 1024 * int(re.search(r"^RssAnon:\\s+(\\d+)", open("/proc/self/status").read(), re.M)[1])

folder, draw = sys.argv[1], random.Random(0)
sizes = ModelSizes.of(CheckpointReader(folder))
ids = torch.arange(4)[None]
bitstrata.load(folder, plan=2)(ids)  # what the libraries keep
start = anonymous()
model = bitstrata.load(folder, plan=8)
for size in (8, "30MB", 2, "45MB", 3, 8, "25MB"):
    model.resize(size)
    with torch.no_grad():
        model(ids)
    held, planned = anonymous() - start, sizes.of_plan(bits_state(model).plan).weights
    print(size, held, planned)
"""


def test_resident_memory_is_within_two_percent_of_the_plans_figure(tmp_path):
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=512,
        max_position_embeddings=64,
    )
    random_checkpoint(tmp_path / "out", config, (2, 3, 5, 8))
    write_order(tmp_path / "out")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "out")]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    rows = [(size, int(held), int(planned)) for size, held, planned in map(str.split, lines)]
    assert len(rows) == 7
    assert len({planned for _, _, planned in rows}) >= 5
    for size, held, planned in rows:
        assert abs(held / planned - 1) < 0.02, (size, held, planned, rows)
