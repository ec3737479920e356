"""Exported GPTQ folders in GPTQModel, through transformers: its logits against ours. With `-s` divergences are shown.

Needs gptqmodel and optimum, which compile, so no target of the Makefile installs them: docs/testing.md says how.
"""

from __future__ import annotations

import sys

import pytest
import torch
from known_models import TEXT
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

import bitstrata
from bitstrata.metrics import Tally

pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
pytest.importorskip("optimum", reason="optimum is not installed")


@pytest.mark.parametrize(("bits", "width"), [(2, 8), (3, 8), (4, 8), (4, 4)])
def test_the_engine_computes_what_was_exported(bits, width, known, tmp_path):
    """Fitted anew, nearly as they are in 8 bits; weights at random make much of the error of 4."""
    _, out = known("llama-wide")
    folder = tmp_path / "gptq"
    result = bitstrata.export_model(out, folder, format="gptq", bits=bits, types=str(width), refit=True)
    assert not result.exact
    engine = AutoModelForCausalLM.from_pretrained(
        folder, device_map="cpu", dtype=torch.float32, quantization_config=GPTQConfig(bits=width, backend="torch")
    )
    assert "gptqmodel" in type(engine.model.layers[0].mlp.up_proj).__module__
    ids = AutoTokenizer.from_pretrained(out)(TEXT, return_tensors="pt").input_ids
    model = bitstrata.load(out, dtype=torch.float32)
    divergences = {}
    with torch.no_grad():
        theirs = engine(ids).logits[0]
        for ours in (2, 3, 4):
            tally = Tally()
            tally.add(theirs[:-1].float(), ids[0, 1:], model(input_ids=ids, bits=ours).logits[0, :-1])
            divergences[ours] = tally.result().kld
    sys.stdout.write(f"{bits} bits as {width}: {divergences}\n")
    less = 50 if width == 8 else 2
    assert all(divergences[bits] < divergences[other] / less for other in divergences if other != bits)
