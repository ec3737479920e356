"""The bundled trained model quantized once, and requests for it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from arithmetic import exact_arithmetic

import bitstrata
from bitstrata.demonstration.run import MODEL
from bitstrata.models import load_tokenizer

BITS = (2, 3, 4)


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundled") / "out"
    bitstrata.quantize(MODEL, output, bits="2-4", method="rtn")
    return output


@pytest.fixture
def exact_kernel():
    """Models that the test loads compute exactly."""
    with exact_arithmetic():
        yield


@pytest.fixture(scope="session")
def model(bundled):
    """Exact, so that its tokens in an engine are those of its own generate."""
    with exact_arithmetic():
        return bitstrata.load(bundled, dtype=torch.float32)


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="session")
def code(tokenizer) -> list[int]:
    """Tokens of real text."""
    text = Path(random.__file__).read_text()
    return list(tokenizer.encode(text, add_special_tokens=False))


@pytest.fixture(scope="session")
def alone(model):
    """alone(prompt, bits, new) -> the tokens that the model's own greedy generate makes, one request at a time."""

    def generate(prompt: list[int], bits: int, new: int) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), bits=bits, max_new_tokens=new, do_sample=False, pad_token_id=0
            )
        return output[0, len(prompt) :].tolist()

    return generate
