"""What single experts cost at fewer bits: as much as the tokens that the router gives them."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_mixtral, tiny_text

import bitstrata
from bitstrata.allocation.layer_loss import layer_losses
from bitstrata.nn import Experts, use_bits
from bitstrata.planes import decode


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    tiny_mixtral(folder / "source", num_local_experts=6)
    bitstrata.quantize(folder / "source", folder / "out", bits="2-4", method="rtn", group_size=32)
    return folder / "out"


def test_losses_of_experts_are_those_of_their_tokens(out):
    model = bitstrata.load(out)
    windows = torch.randint(2, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    found = layer_losses(model, windows)
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    seen = []
    handle = experts.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    with torch.no_grad(), use_bits(model, 4):
        model(windows)
    handle.remove()
    x, chosen, _ = seen[0]
    weights = [experts.get_submodule(f"{e}.up_proj") for e in range(6)]
    inputs = [x[(chosen == e).any(-1)].double() for e in range(6)]
    least = experts._least_rows(len(x), x.dtype)  # an expert runs on so many rows, of which the first is repeated
    run = [torch.cat([rows, rows[:1].expand(max(0, least - len(rows)), -1)]) for rows in inputs]
    decoded = [{bits: decode(w.plane_weight(), bits).double() for bits in (2, 3, 4)} for w in weights]

    def loss(e: int, weight: torch.Tensor) -> float:
        return len(inputs[e]) * float((run[e] @ weight.T).square().sum(1).mean())

    whole = sum(loss(e, decoded[e][4]) for e in range(6))
    for e in range(6):
        for bits in (2, 3):
            expected = loss(e, decoded[e][bits] - decoded[e][4]) / whole
            assert found[weights[e].name][bits] == pytest.approx(expected, rel=1e-3)
    assert sum(map(len, inputs)) == 2 * windows.numel()


@pytest.mark.parametrize("measure", ["hessian", "kld"])
def test_a_plan_gives_each_expert_its_bits(out, tmp_path, measure):
    text = tiny_text(tmp_path / "text.txt")
    report = bitstrata.plan(
        out, budget="4.5bpw", text=text, measure=measure, windows=2, seq_len=32, sensitivity=tmp_path / "s.json",
        output=tmp_path / "plan.json",
    )  # fmt: skip
    plan = bitstrata.Plan.load(tmp_path / "plan.json")
    names = [f"model.layers.{layer}.mlp.experts.{e}.down_proj" for layer in range(2) for e in range(6)]
    assert set(names) <= plan.keys()
    assert len({plan[name] for name in names}) > 1
    model = bitstrata.load(out, plan=tmp_path / "plan.json")
    ids = torch.randint(2, 60, (1, 20))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, bitstrata.load(out)(ids, bits=plan).logits)
    assert report.plan == plan
