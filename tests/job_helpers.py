"""What tests of the quantization job share: a quick job, and a way to compare whole folders."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_tokenizer
from transformers import AutoModelForCausalLM

import bitstrata
from bitstrata.calibration import calibration_windows, read_text
from bitstrata.metrics import Tally
from bitstrata.quantization import Report, quantize
from bitstrata.quantization.preflight import heldout_windows

# a job of a fraction of a second that still trains every block
ANYBCQ = {"method": "anybcq", "options": {"steps": 6, "rounds": 3, "batch_size": 4}}
ANYPRECISION = {"method": "anyprecision", "options": {}}
BCQ = {"method": "bcq", "options": {"rounds": 3}}
RTN = {"method": "rtn", "options": {}}


def run(model: Path, output: Path, text: Path | None, **changes: Any) -> Report:
    """`bitstrata.quantize` with small settings."""
    settings: dict[str, Any] = {
        "bits": "2-4",
        "group_size": 32,
        "calibration": text,
        "num_samples": 6,
        "seq_len": 32,
        "device": "cpu",
        **ANYBCQ,
        **changes,
    }
    return quantize(model, output, **settings)


def assert_report_measures_the_checkpoint(report: Report, model: Path, output: Path, text: Path) -> None:
    """What the job measured with chains of blocks is what the checkpoint that it wrote measures on the same windows."""
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    quantized = bitstrata.load(output, device="cpu")
    windows = calibration_windows(
        tiny_tokenizer(), read_text(text), num_samples=6, seq_len=32, num_heldout=heldout_windows(32), seed=0
    ).heldout
    with torch.no_grad():
        expected = original(windows).logits[:, :-1].flatten(0, 1)
        targets = windows[:, 1:].flatten()
        base = Tally()
        base.add(expected, targets)
        assert report.reference is not None
        assert report.reference["nll"] == pytest.approx(base.result().nll, rel=1e-5)
        assert report.heldout_tokens == len(targets)
        for row in report.results:
            tally = Tally()
            tally.add(quantized(windows, bits=row["bits"]).logits[:, :-1].flatten(0, 1), targets, expected)
            assert row["nll"] == pytest.approx(tally.result().nll, rel=1e-4)
            assert row["kld"] == pytest.approx(tally.result().kld, rel=1e-3)
            assert row["top1_agreement"] == pytest.approx(tally.result().top1_agreement, abs=0.01)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`, by relative name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
