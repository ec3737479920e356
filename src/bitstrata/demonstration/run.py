"""Quantize the bundled model once, measure it at each precision, and let it speak at each.

The model writes Python. Its calibration and evaluation texts are the modules of the running
Python's standard library, split by module name. The model has seen the standard library in
training, so absolute perplexity flatters it; the distance between precisions does not.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..evaluation import evaluate
from ..models import encode_prompt, load_tokenizer
from ..options import DemoOptions
from ..plans import load
from ..progress import log
from ..quantization import quantize
from ..runtime import Generation, GenerationSettings, continue_tokens
from ..tables import render
from ..torch_state import ordinary_torch
from ..verbs import verb

MODEL = Path(__file__).parent / "model"
BITS = (2, 3, 4)
PROMPT = "class Node:\n    def __init__(self, value, next=None):\n"
NEW_TOKENS = 40
EVALUATION_TOKENS = 12_000


@dataclass(frozen=True)
class Demo:
    """rows: one for the original in bf16 and one a precision; texts: what each wrote after the prompt."""

    rows: tuple[dict[str, Any], ...]
    prompt: str
    texts: dict[str, str]
    seconds: float
    output: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        cells = []
        for row in self.rows:
            kld = "" if row["kld"] is None else f"{row['kld']:.4f}"
            speed = "-" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:.0f}"
            cells.append(
                [row["bits"], f"{row['bpw']:.3f}", f"{row['bytes'] / 1e6:.2f}", f"{row['perplexity']:.3f}", kld, speed]
            )
        columns = ["bits", "bpw", "MB", "perplexity", "kld", "tokens/s"]
        parts = [render("pycode-5m: linear layers of one checkpoint, at each precision", columns, cells)]
        for bits, text in self.texts.items():
            parts.append(f"--- {bits} ---\n{self.prompt}{text}")
        kept = f"; the model is in {self.output}" if self.output else ""
        parts.append(f"{self.seconds:.0f} s{kept}")
        return "\n\n".join(parts)


@verb(DemoOptions)
@ordinary_torch()
def demo(options: DemoOptions) -> Demo:
    """Run the main job on the bundled model."""
    output = options.output
    started = time.monotonic()
    workspace = Path(tempfile.mkdtemp(prefix="bitstrata-demo-"))
    try:
        folder = Path(output) if output is not None else workspace / "model"
        log.info("quantizing pycode-5m once, for 2, 3 and 4 bits (nested)")
        quantize(
            MODEL,
            folder,
            bits=BITS,
            method="nested",
            group_size=128,
            calibration="stdlib",
            num_samples=64,
            seq_len=256,
        )
        rows, texts = _measure(folder)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    kept = None if output is None else str(output)
    return Demo(rows, PROMPT, texts, time.monotonic() - started, kept)


def _measure(folder: Path) -> tuple[tuple[dict[str, Any], ...], dict[str, str]]:
    log.info("measuring on held-out modules of the standard library")
    evaluation = evaluate(folder, "stdlib", bits=BITS, reference=MODEL, seq_len=256, max_tokens=EVALUATION_TOKENS)
    tokenizer = load_tokenizer(folder)
    quantized = load(folder)
    original: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(MODEL), dtype=torch.bfloat16)
    count = evaluation.results[0].bytes * 8 / evaluation.results[0].bpw_read
    assert evaluation.reference is not None

    prompt = encode_prompt(tokenizer, PROMPT)

    def speak(model: PreTrainedModel, bits: int | None) -> Generation:
        settings = GenerationSettings(NEW_TOKENS)
        return continue_tokens(model, tokenizer, prompt, PROMPT, bits=bits, settings=settings)

    log.info("continuing the same prompt at each precision")
    made = speak(original, None)
    texts = {"bf16": made.text}
    rows: list[dict[str, Any]] = [
        {
            "bits": "bf16",
            "bpw": 16.0,
            "bytes": round(count * 2),
            "perplexity": evaluation.reference["perplexity"],
            "kld": None,
            "tokens_per_second": made.tokens_per_second,
        }
    ]
    for result in evaluation.results:
        made = speak(quantized, int(result.bits))
        texts[f"{result.bits} bits"] = made.text
        rows.append(
            {
                "bits": str(result.bits),
                "bpw": result.bpw_read,
                "bytes": result.bytes,
                "perplexity": result.perplexity,
                "kld": result.kld,
                "tokens_per_second": made.tokens_per_second,
            }
        )
    return tuple(rows), texts
