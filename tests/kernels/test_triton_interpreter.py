"""test_triton_kernels.py on the CPU: in processes where Triton interprets its kernels."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("test_triton_kernels.py")
PARTS = {"products": "all_bits or every_number", "the-rest": "not all_bits and not every_number"}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (Linux only)")
@pytest.mark.parametrize("part", PARTS)
def test_every_kernel_in_the_interpreter(part):
    environment = os.environ | {"TRITON_INTERPRET": "1", "BITSTRATA_KERNEL": "triton", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(FILE), "-k", PARTS[part]]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FILE.parents[2])
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout, ran.stdout[-2000:]
