"""A tiny model, the same at 2, 3 and 4 bits, a text, and small random problems."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from job_helpers import BCQ
from job_helpers import run as quantize
from tiny_models import tiny_llama, tiny_text


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text(tmp_path_factory.mktemp("text") / "text.txt", documents=12, words=60)


@pytest.fixture(scope="session")
def pristine(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished checkpoint; not to be changed."""
    output = tmp_path_factory.mktemp("quantized") / "out"
    quantize(original, output, None, **BCQ)
    return output


@pytest.fixture(scope="session")
def measured(pristine: Path, original: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with its layers measured against the original; not to be changed."""
    import bitstrata

    folder = shutil.copytree(pristine, tmp_path_factory.mktemp("measured") / "out")
    bitstrata.plan(folder, "4bpw", "milp", text, original, windows=4, seq_len=32, device="cpu")
    return folder


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "out")


@pytest.fixture
def known(measured: Path, tmp_path: Path) -> Path:
    return shutil.copytree(measured, tmp_path / "known")
