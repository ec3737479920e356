"""The public command under a limit of memory that the system sets: layers whose moments are wide fit all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama

resource = pytest.importorskip("resource")  # not on Windows

WIDTH = 6144  # a matrix of float64 as wide as this takes 302 MB, and one of fp32 half of that
LIMIT = 2_400_000_000  # bytes of private memory, reserved or used; the interpreter and its libraries take a quarter


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not count private memory")
@pytest.mark.slow
def test_three_precisions_of_a_wide_layer_fit(text: Path, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", hidden_size=64, intermediate_size=WIDTH, num_hidden_layers=1)
    command = [sys.executable, "-m", "bitstrata.cli.main", "quantize", str(model), "-o", str(tmp_path / "out")]
    command += ["--bits", "2-4", "--group-size", "128", "--calibration", str(text), "--json"]
    command += ["--num-samples", "8", "--seq-len", "32", "--device", "cpu"]
    command += ["--option", "iterations=1", "--option", "sweeps=1"]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT)),
    )
    assert run.returncode == 0, run.stderr
    assert torch.cuda.is_available() or json.loads(run.stdout)["peak_memory_bytes"] < LIMIT
