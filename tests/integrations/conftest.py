"""The checkpoint that vLLM serves here."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

import bitstrata
from bitstrata.checkpoint import CheckpointReader, Fingerprint
from bitstrata.plans import Plan

DEMO = Path(bitstrata.__file__).parent / "demonstration" / "model"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model at 2 to 4 bits, and a tied head and embedding of 6."""
    folder = tmp_path_factory.mktemp("vllm") / "demo"
    run = [sys.executable, "-m", "bitstrata.cli.main", "quantize", str(DEMO), "-o", str(folder), "--method", "rtn"]
    subprocess.run([*run, "--bits", "2-4", "--group-size", "64", "--head-bits", "6"], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def plan(checkpoint: Path) -> Path:
    """A plan of that model, in which the layers that vLLM joins have different bits."""
    draw, path = random.Random(3), checkpoint.with_name("mixed.json")
    reader = CheckpointReader(checkpoint)
    bits = {name: draw.choice(reader.bits) for name in reader.spec.planned_layers}
    assert len({bits[f"model.layers.0.self_attn.{part}_proj"] for part in "qkv"}) > 1
    Plan(bits, Fingerprint.of(reader)).save(path)
    return path
