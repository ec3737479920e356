"""int8 activations and byte levels move a trained model's predictions far less than quantization does."""

from __future__ import annotations

import pytest
import torch
from job_helpers import RTN, run
from transformers import AutoModelForCausalLM

from bitstrata import load
from bitstrata.calibration import read_text
from bitstrata.demonstration.run import MODEL
from bitstrata.kernels import registry, select
from bitstrata.kernels.cpu import missing
from bitstrata.models import load_tokenizer

pytestmark = pytest.mark.skipif(bool(missing), reason="the native kernels are not built")
WINDOWS, LENGTH = 12, 256


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The model that the demo quantizes, by rounding: the quickest method."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    run(MODEL, folder, None, group_size=128, **RTN)
    return folder


@pytest.fixture(scope="module")
def windows():
    ids = load_tokenizer(MODEL)("\n".join(read_text("stdlib", part="heldout")[:20]))["input_ids"]
    return torch.tensor(ids[: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)


def divergence(p, q):
    """The mean KL divergence of q from p, both log-probabilities [..., vocabulary]."""
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_int8_activations_on_a_trained_model(trained, windows, monkeypatch):
    isa = select("cpu", torch.float32).name
    original, models = AutoModelForCausalLM.from_pretrained(MODEL), {}
    for kernel in (f"{isa}-exact", f"{isa}-int8", "reference"):
        monkeypatch.setenv(registry.ENVIRONMENT, kernel)
        models[kernel] = load(trained, dtype=torch.float32)
    with torch.no_grad():
        true = original(windows).logits.log_softmax(-1)
        for bits in (2, 3, 4):
            found = {name: model(windows, bits=bits).logits.log_softmax(-1) for name, model in models.items()}
            exact = found[f"{isa}-exact"]
            cost, quantization = divergence(exact, found[f"{isa}-int8"]), divergence(true, exact)
            assert 0 < cost < min(0.001, 0.03 * quantization), f"{bits} bits: {cost:.2g} of {quantization:.2g}"
            assert divergence(exact, found["reference"]) < 1e-7, bits
