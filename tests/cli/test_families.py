"""A hybrid and a wrapper from the command line: quantized with calibration, measured, and generated with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sweep
from cli_outcome import Command
from tiny_models import save

SETTINGS = ["--bits", "2,8", "--group-size", "16", "--num-samples", "4", "--seq-len", "32",
            "--option", "iterations=2", "--option", "tune_steps=2"]  # fmt: skip


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3"])
def test_it_goes_through_every_verb(name: str, text: Path, tmp_path: Path, cli: Command) -> None:
    source = save(sweep.build(name)[0], tmp_path / "source")
    out = tmp_path / "out"
    made = cli("quantize", source, "-o", out, *SETTINGS, "--calibration", text, "--json")
    assert made.code == 0, made.err
    results = json.loads(made.out)["results"]
    assert results[1]["kld"] < 0.1 * results[0]["kld"]
    dry = cli("quantize", source, "-o", tmp_path / "dry", *SETTINGS, "--calibration", text, "--dry-run")
    assert "stays as it is (outside the decoder blocks)" in dry.err
    assert ("stays as it is (convolution)" in dry.err) == (name == "qwen3_5")
    measured = cli(
        "eval", out, "--text", text, "--reference", source, "--seq-len", "32", "--max-tokens", "90", "--json"
    )
    assert measured.code == 0, measured.err
    rows = json.loads(measured.out)["results"]
    assert rows[1]["kld"] < 0.1 * rows[0]["kld"]
    said = cli("generate", out, "a cat and", "--bits", "8", "--max-new-tokens", "5", "--json")
    assert said.code == 0, said.err
    assert 1 <= json.loads(said.out)["tokens"] <= 5
