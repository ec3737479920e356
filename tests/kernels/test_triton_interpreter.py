"""test_triton_kernels.py and test_triton_attention.py on the CPU: in processes where Triton interprets its kernels."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PARTS = {
    "products": ("test_triton_kernels.py", "all_bits or every_number"),
    "the-rest": ("test_triton_kernels.py", "not all_bits and not every_number"),
    "attention": ("test_triton_attention.py", "test"),
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (Linux only)")
@pytest.mark.parametrize("part", PARTS)
def test_every_kernel_in_the_interpreter(part):
    environment = os.environ | {"TRITON_INTERPRET": "1", "BITSTRATA_KERNEL": "triton", "CUDA_VISIBLE_DEVICES": ""}
    name, chosen = PARTS[part]
    file = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file), "-k", chosen]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=file.parents[2])
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout, ran.stdout[-2000:]
