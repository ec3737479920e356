"""Without the native extension everything still works, and says what it lacks."""

from __future__ import annotations

import subprocess
import sys

import pytest

# An entry of None makes the import fail, as a missing file would.
WITHOUT = """
import sys, warnings
sys.modules["bitstrata.kernels.cpu._native"] = None
"""

PROGRAMS = {
    "a layer is prepared": """
import torch
from bitstrata.benchmark.random_model import random_weight
from bitstrata.nn import PlaneLinear
from bitstrata.planes import decode
weight = random_weight(19, 70, (2, 3), 32, torch.Generator().manual_seed(0))
layer = PlaneLinear.from_weight(weight)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    layer.pack()
(warning,) = [w for w in seen if "CPU kernels cannot be used" in str(w.message)]
assert "the native extension is not there" in str(warning.message)
assert "C++17 compiler" in str(warning.message)
assert layer.packed.layout == "stored"
x = torch.randn(3, 70)
torch.testing.assert_close(layer(x), x @ decode(weight, 3, torch.float32).T)
""",
    "env says so": """
from bitstrata.cli.main import run
assert run(["env"]) == 0
""",
    "a kernel of it is forced": """
import os, torch
os.environ["BITSTRATA_KERNEL"] = "avx512"
from bitstrata.cli.main import run
assert run(["bench", "--shapes", "64x64", "--rounds", "1"]) == 2
""",
    "bench runs": """
from bitstrata.cli.main import run
assert run(["bench", "--shapes", "64x64", "--rounds", "1", "--regime", "cache"]) == 0
""",
}
SAID = {
    "a layer is prepared": "",
    "env says so": "the native extension is not there",
    "a kernel of it is forced": "avx512",
    "bench runs": "kernel reference",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_without_the_extension(name):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + PROGRAMS[name]], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert SAID[name] in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
