"""`gpu`: a device to run on, pretended or real.

On the pretended one runs what can show that tensors of two devices meet or that the host waits; the rest needs a real
one, as `-m gpu` has it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from job_helpers import RTN, run
from pretended_gpu import CUDA, REAL, pretended_gpu
from tiny_models import tiny_llama, tiny_text


@pytest.fixture(params=["pretended", REAL])
def gpu(request, monkeypatch):
    """The device's name."""
    if request.param == "real":
        yield str(CUDA)
        return
    if torch.cuda.is_available():
        pytest.skip("there is a real GPU")
    with pretended_gpu(monkeypatch):
        yield str(CUDA)


@pytest.fixture
def pretended(monkeypatch):
    """The pretended device itself, whose `waits` can be asked."""
    if torch.cuda.is_available():
        pytest.skip("there is a real GPU")
    with pretended_gpu(monkeypatch) as device:
        yield device


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def checkpoint(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bits 2, 3, 4; the head and the embedding at 6."""
    output = tmp_path_factory.mktemp("checkpoint") / "out"
    run(source, output, None, head_bits=6, **RTN)
    return output
