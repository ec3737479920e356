"""Quantized tiny models, made once."""

from __future__ import annotations

from pathlib import Path

import architectures
import pytest
from transformers import PreTrainedModel

import bitstrata


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory):
    """name -> (original model, its folder, folder quantized with rtn at bits 2, 3, 8), built on demand."""
    made: dict[str, tuple[PreTrainedModel, Path, Path]] = {}

    def get(name: str) -> tuple[PreTrainedModel, Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            original = architectures.save(name, folder / "source")
            bitstrata.quantize(
                folder / "source",
                folder / "out",
                bits="2,3,8",
                method="rtn",
                group_size=32,
            )
            made[name] = (original, folder / "source", folder / "out")
        return made[name]

    return get
