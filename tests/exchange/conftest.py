"""Quantized models to export."""

from __future__ import annotations

from pathlib import Path

import pytest
from known_models import save_known
from quantized_models import quantized  # noqa: F401  (a fixture)

import bitstrata


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory):
    """name of KNOWN -> its folder, and a checkpoint of it with rtn at bits 2, 3, 4, built on demand."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            save_known(name, folder / "source")
            bitstrata.quantize(folder / "source", folder / "out", bits="2-4", method="rtn", group_size=32)
            made[name] = folder / "source", folder / "out"
        return made[name]

    return get
