"""Weights that stay narrow: the numbers of fp32, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitstrata.calibration import widening as room
from bitstrata.calibration.widening import may_stay_narrow, widening


class Other(nn.Linear):
    """May read its weight's dtype."""


def build(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.ModuleDict({"table": nn.Embedding(9, 6), "inner": nn.Linear(6, 50), "last": nn.Linear(50, 7, bias=False)})


def run(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model["last"](model["inner"](model["table"](ids)).tanh())  # type: ignore[index]
    return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_weights_give_the_numbers_of_fp32(
    dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "STRETCH", 64)  # ten rows of `inner`, one of `last`
    model, ids = build(seed), torch.tensor([[1, 8, 3]])
    for module in model.children():
        module.weight.data = module.weight.data.to(dtype)
    wide = build(seed)
    for module, narrow in zip(wide.children(), model.children(), strict=True):
        module.weight.data = narrow.weight.data.float()
    expected = run(wide, ids)
    with widening(model):
        found = run(model, ids)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert found.dtype == torch.float32
        model["inner"].weight = wide["inner"].weight  # type: ignore[index]
        torch.testing.assert_close(run(model, ids), expected, rtol=1e-6, atol=1e-6)
        hidden = torch.randn(2, 50, requires_grad=True)
        model["last"](hidden).sum().backward()  # type: ignore[index]
        assert torch.equal(hidden.grad, wide["last"].weight.sum(0).expand(2, -1))  # type: ignore[index]
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert model["last"].weight.dtype == dtype  # type: ignore[index]


def test_where_products_are_made_in_few_bits_weights_are_taken_as_they_are(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = build(seed), torch.randn(3, 6)
    narrow = build(seed)
    for module in narrow.children():
        module.weight.data = module.weight.data.bfloat16()
    monkeypatch.setattr(room, "row_chunks", lambda *_: pytest.fail("a weight was widened"))
    with widening(narrow), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(narrow["inner"](x), model["inner"](x))  # type: ignore[index]


def test_other_classes_stay_wide() -> None:
    model = nn.ModuleDict({"plain": nn.Linear(2, 2), "other": Other(2, 2), "norm": nn.LayerNorm(2)})
    assert may_stay_narrow(model, "") == {"plain.weight"}
    assert may_stay_narrow(model, "model.0") == {"model.0.plain.weight"}
    with widening(model):
        assert not any("forward" in module.__dict__ for module in model.modules()), "all are fp32 already"
