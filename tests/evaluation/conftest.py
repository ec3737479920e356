"""A tiny model, the same quantized, and a text with documents of different lengths."""

from __future__ import annotations

from pathlib import Path

import pytest
from job_helpers import BCQ, run
from tiny_models import tiny_llama, tiny_text


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quantized") / "out"
    run(model, output, None, **BCQ)
    return output


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_text(tmp_path_factory.mktemp("text") / "text.txt", documents=3, words=30)
    path.write_text(path.read_text() + "<|endoftext|>a<|endoftext|>short one<|endoftext|>" + "x" * 47)
    return path
