"""A tiny model and a text for it, shared by the tests of the job."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tiny_models import tiny_llama, tiny_text


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks, so that there is a first, a middle and a last one."""
    return tiny_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=3)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(autouse=True)
def messages_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """So that `caplog` has what a job says, not only its notes."""
    caplog.set_level(logging.INFO, "bitstrata")
