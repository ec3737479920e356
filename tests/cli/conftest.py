"""A model, a text, a finished checkpoint, and a way to call the command line without a process."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_outcome import Command, Outcome
from job_helpers import BCQ
from job_helpers import run as quantize
from tiny_models import tiny_llama, tiny_text

from bitstrata.cli.main import run


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    """Call `bitstrata` with these arguments in this process."""

    def call(*arguments: object, debug: bool = False) -> Outcome:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments], debug=debug)
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def quantized(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished checkpoint at 2, 3 and 4 bits; not to be changed."""
    output = tmp_path_factory.mktemp("quantized") / "out"
    quantize(model, output, text, **BCQ)
    return output
