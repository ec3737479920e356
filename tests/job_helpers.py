"""What tests of the quantization job share: a quick job, and a way to compare whole folders."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from bitstrata.progress import Reporter
from bitstrata.quantize import Report, quantize

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
        "reporter": Reporter(),
        **ANYBCQ,
        **changes,
    }
    return quantize(model, output, **settings)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`, by relative name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
