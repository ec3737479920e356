"""Every causal architecture of transformers comes out right, or is refused in words; nothing is wrong silently."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import every_architecture
import pytest
import torch
from helpers import with_decoded_weights
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

import bitstrata
from bitstrata.errors import PreflightError
from bitstrata.nn import PlaneLinear


def quantize(source: Path, output: Path) -> None:
    bitstrata.quantize(source, output, bits="2,8", method="rtn", group_size=16)


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(ids, use_cache=False).logits
    return result


def known(names: Iterable[str]) -> list[Any]:
    """Those that this version of transformers has; the ordinary run has the representative ones."""
    return [
        pytest.param(name, marks=[] if name in every_architecture.REPRESENTATIVE else [pytest.mark.slow])
        for name in names
        if name in KNOWN
    ]


@pytest.mark.parametrize("name", known(every_architecture.RIGHT))
def test_it_computes_what_its_decoded_weights_do(name: str, tmp_path: Path, seed: int) -> None:
    every_architecture.build(name, every_architecture.RIGHT[name], seed).save_pretrained(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    model = bitstrata.load(tmp_path / "out")
    assert any(isinstance(layer, PlaneLinear) for layer in model.modules())
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(seed))
    for bits in (2, 8):
        expected = logits(with_decoded_weights(original, model, bits), ids)
        with bitstrata.use_bits(model, bits):
            torch.testing.assert_close(logits(model, ids), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    before, after = logits(original, ids), logits(model, ids)
    assert float((after - before).norm() / before.norm()) < 0.15
    later = ids.clone()
    later[:, -1] = (ids[:, -1] - 3 + 41) % 87 + 3
    torch.testing.assert_close(logits(original, later)[:, :-1], before[:, :-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", known(every_architecture.REFUSED))
def test_it_is_refused_in_words(name: str, tmp_path: Path) -> None:
    settings, words = every_architecture.REFUSED[name]
    every_architecture.build(name, settings, 0).save_pretrained(tmp_path / "source")
    with pytest.raises(PreflightError, match=words):
        quantize(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()
