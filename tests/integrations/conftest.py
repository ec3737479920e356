"""The checkpoint that vLLM serves here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import bitstrata

DEMO = Path(bitstrata.__file__).parent / "demonstration" / "model"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model at 2 to 4 bits, and a tied head and embedding of 6."""
    folder = tmp_path_factory.mktemp("vllm") / "demo"
    run = [sys.executable, "-m", "bitstrata.cli.main", "quantize", str(DEMO), "-o", str(folder), "--method", "rtn"]
    subprocess.run([*run, "--bits", "2-4", "--group-size", "64", "--head-bits", "6"], check=True, capture_output=True)
    return folder
