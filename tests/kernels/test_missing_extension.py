"""Without the native extension everything still works, and says what it lacks."""

from __future__ import annotations

import subprocess
import sys

# An entry of None makes the import fail, as a missing file would.
PROGRAM = """
import os, sys, warnings
sys.modules["bitstrata.kernels.cpu._native"] = None
import torch
import bitstrata.kernels.triton
assert "bitstrata.kernels.triton.launch" not in sys.modules, "triton is imported where nothing uses it"
from bitstrata.benchmark.random_model import random_weight
from bitstrata.cli.main import run
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

BENCH = ["bench", "--shapes", "64x64", "--rounds", "1", "--regime", "cache"]
for label, arguments, code in (("env", ["env"], 0), ("bench", BENCH, 0), ("forced", BENCH, 2)):
    if label == "forced":
        os.environ["BITSTRATA_KERNEL"] = "avx512"
    for stream in (sys.stdout, sys.stderr):
        print(f"== {label}", file=stream, flush=True)
    assert run(arguments) == code, label
"""
SAID = {"env": "the native extension is not there", "bench": "kernel reference", "forced": "avx512"}


def parts(text: str) -> dict[str, str]:
    """What was printed after each "== label"."""
    return dict(part.split("\n", 1) for part in text.split("== ")[1:])


def test_without_the_extension() -> None:
    """In one process, because it takes seconds to start: a layer is prepared, then three commands."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    out, err = parts(done.stdout), parts(done.stderr)
    for label, words in SAID.items():
        assert words in out[label] + err[label], label
