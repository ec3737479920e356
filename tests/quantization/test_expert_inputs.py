"""The second moments of what single experts read, and jobs on models with experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from job_helpers import ANYBCQ, ANYPRECISION, BCQ, assert_report_measures_the_checkpoint, digests, run
from tiny_models import tiny_mixtral
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from bitstrata.models.experts import split_experts
from bitstrata.quantization import expert_inputs
from bitstrata.quantization.block_task import BlockTask
from bitstrata.quantization.chains import CHAIN
from bitstrata.quantization.expert_inputs import counting, prior_share, tokens_of_experts
from bitstrata.quantization.state import JobState

H, INNER, E, BITS = 12, 20, 4, (2, 4)
NESTED = {"method": "nested", "options": {"tune_steps": 0}}


class Block(nn.Module):
    """h + experts(h), whose router never chooses the last expert."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        config = MixtralConfig(hidden_size=H, intermediate_size=INNER, num_local_experts=E, num_experts_per_tok=2)
        config._experts_implementation = "eager"
        self.mlp = MixtralSparseMoeBlock(config)
        split_experts(self)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            for key, parameter in module.named_parameters(recurse=False):
                value = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
                setattr(module, key, nn.Parameter(value, requires_grad=False))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.mlp(hidden)


def make_task(seed: int) -> BlockTask:
    block = Block(seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    inputs = torch.randn(6, 5, H, generator=generator)
    inputs[..., 0] = 3.0
    block.mlp.gate.weight[-1, 0] = -9.0
    names = [f"mlp.experts.{e}.{name}" for e in range(E) for name in ("gate_proj", "up_proj", "down_proj")]
    return BlockTask(
        block=block,
        weights={name: block.get_submodule(name).weight.detach().clone() for name in names},  # type: ignore[misc, union-attr]
        transposed=frozenset(),
        bits=BITS,
        group_size=16,
        call=lambda module, hidden: module(hidden),
        inputs=inputs,
        targets=None,
        chains={p: inputs + 0.3 * 2.0**-p * torch.randn(6, 5, H, generator=generator) for p in BITS},
        generator=generator,
        say=lambda message: None,
    )


def routing(block: Block, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, and their experts and scores, by the router itself."""
    x = hidden.reshape(-1, H)
    _, scores, chosen = block.mlp.gate(x)
    return x, chosen, scores


def written_out(original, quantized, scores, prior_original, prior_quantized, tokens):
    """H and C of the formula, in float64."""

    def moments(a, b, s):
        a, b, s = a.double(), b.double(), s.double()[:, None]
        total = max(float(s.sum()), 1e-30)
        return (s * b).T @ b / total, a.T @ (s * b) / total

    own = moments(original, quantized, scores)
    prior = moments(prior_original, prior_quantized, torch.ones(len(prior_original)))
    k = original.shape[1]
    return [(tokens * mine + k * of_all) / (tokens + k) for mine, of_all in zip(own, prior, strict=True)]


def test_each_expert_has_two_groups_in_its_place(seed):
    groups = make_task(seed).input_groups()
    assert groups == [
        [f"mlp.experts.{e}.{name}" for name in names]
        for e in range(E)
        for names in (("gate_proj", "up_proj"), ("down_proj",))
    ]


@pytest.mark.parametrize("rows", [3, expert_inputs.ROWS])
@pytest.mark.parametrize("expert", range(E))
def test_moments_are_those_of_the_formula(expert, rows, seed, monkeypatch):
    monkeypatch.setattr(expert_inputs, "ROWS", rows)
    task = make_task(seed)
    coarse = {p: {name: (w * 2**p).round() / 2**p for name, w in task.weights.items()} for p in BITS}
    names = {name: f"mlp.experts.{expert}.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    into = task.moments([names["gate_proj"], names["up_proj"]], coarse)
    down = task.moments([names["down_proj"]], coarse)
    x, *_ = routing(task.block, task.inputs)

    def inner(inputs, weights):
        inputs = inputs.double()
        gate, up = (inputs @ weights[names[name]].double().T for name in ("gate_proj", "up_proj"))
        return nn.functional.silu(gate) * up

    some = torch.arange(0, len(x), max(1, len(x) // (2 * INNER)))
    for bits in BITS:
        quantized, chosen, scores = routing(task.block, task.chains[bits])
        at, slot = (chosen == expert).nonzero(as_tuple=True)
        weight = scores[at, slot]
        expected = written_out(x[at], quantized[at], weight, x, quantized, len(at))
        torch.testing.assert_close(into[bits].hessian.double(), expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(into[bits].cross.double(), expected[1], rtol=1e-4, atol=1e-5)
        expected = written_out(
            inner(x[at], task.weights), inner(quantized[at], coarse[bits]), weight,
            inner(x[some], task.weights), inner(quantized[some], coarse[bits]), len(at),
        )  # fmt: skip
        torch.testing.assert_close(down[bits].hessian.double(), expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(down[bits].cross.double(), expected[1], rtol=1e-4, atol=1e-5)
        assert len(at) > 0 or expert == E - 1
    assert not any(module._forward_pre_hooks for module in task.block.modules())


def test_an_expert_without_tokens_is_solved_on_all_that_the_layer_reads(seed):
    task = make_task(seed)
    coarse = {p: dict(task.weights) for p in BITS}
    name = f"mlp.experts.{E - 1}.up_proj"
    for bits in BITS:
        assert not (routing(task.block, task.chains[bits])[1] == E - 1).any()
        x = task.chains[bits].reshape(-1, H)
        found = task.moments([name], coarse)[bits]
        torch.testing.assert_close(found.hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        assert float(found.hessian.diagonal().min()) > 0
    assert prior_share(0, H) == 1.0
    assert prior_share(H, H) == 0.5


def test_what_experts_read_is_in_files_that_are_removed(tmp_path, seed):
    task = make_task(seed)
    task.scratch = tmp_path
    coarse = {p: dict(task.weights) for p in BITS}
    task.moments(["mlp.experts.0.up_proj"], coarse)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [f"{CHAIN}-experts-mlp.experts-{chain}" for chain in ("2", "4", "original")]
    assert all(path.stat().st_size == 30 * H * 4 for path in tmp_path.iterdir())
    of = task._of_experts[1]
    assert torch.equal(of.chains[2].inputs[:], task.chains[2].reshape(-1, H))
    assert torch.equal(of.original.inputs[torch.tensor([4, 5, 1, 29])], task.inputs.reshape(-1, H)[[4, 5, 1, 29]])
    task.close()
    assert list(tmp_path.iterdir()) == []


def test_tokens_of_the_learning_windows_are_counted(seed):
    task = make_task(seed)
    with counting(task.block) as calls:
        for part in (task.inputs[:1], task.inputs[:2], task.inputs[2:], task.chains[2]):  # a probe first, a check last
            task.block(part)
    found = tokens_of_experts(calls["mlp.experts"], tokens=30, later=30)
    expected = routing(task.block, task.inputs)[1].flatten().bincount(minlength=E).tolist()
    assert found == expected
    assert sum(found) == 60


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mixtral(tmp_path_factory.mktemp("mixtral"))


@pytest.mark.parametrize("method", [NESTED, ANYBCQ, ANYPRECISION, BCQ], ids=lambda method: method["method"])
def test_every_kind_of_method_solves_experts(method, mixture, text, tmp_path):
    report = run(mixture, tmp_path / "out", text, **method)
    assert_report_measures_the_checkpoint(report, mixture, tmp_path / "out", text)
    assert report.layer_error.keys() >= {f"model.layers.1.mlp.experts.3.{name}_proj" for name in ("gate", "up", "down")}
    experts = report.experts
    assert all(sum(of["tokens"]) == 6 * 32 * 2 for of in experts.values())
    if method is NESTED:
        one = experts["model.layers.0.mlp.experts"]
        assert one["prior"] == [prior_share(tokens, 64) for tokens in one["tokens"]]
        assert "4 experts saw" not in str(report)
        assert "8 experts saw" in str(report)
    saved = json.loads((tmp_path / "out" / "bitstrata_report.json").read_text())
    assert saved["experts"] == json.loads(json.dumps(experts))


def test_a_resumed_job_gives_the_same_bytes(mixture, text, tmp_path, monkeypatch):
    run(mixture, tmp_path / "unbroken", text, **NESTED)
    save = JobState.save

    def stop(self: JobState, index, weights) -> None:
        save(self, index, weights)
        raise KeyboardInterrupt

    monkeypatch.setattr(JobState, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        run(mixture, tmp_path / "out", text, **NESTED)
    monkeypatch.undo()
    run(mixture, tmp_path / "out", text, **NESTED)
    assert digests(tmp_path / "out") == digests(tmp_path / "unbroken")
    shutil.rmtree(tmp_path / "out")


def test_experts_that_no_token_reached_are_named(text, tmp_path):
    model = tiny_mixtral(tmp_path / "source", num_local_experts=48, num_experts_per_tok=1, intermediate_size=32)
    report = run(model, tmp_path / "out", text, **{**NESTED, "num_samples": 1})
    unseen = [e for e, count in enumerate(report.experts["model.layers.0.mlp.experts"]["tokens"]) if not count]
    assert unseen
    words = ", ".join(map(str, unseen))
    assert any(f"model.layers.0.mlp.experts: no token of the calibration text reached expert {words}" in said
               for said in report.notes)  # fmt: skip
    errors = [report.layer_error[f"model.layers.0.mlp.experts.{e}.up_proj"]["4"] for e in range(48)]
    assert max(errors) < 2.25 * sorted(errors)[24]  # squares: 1.5 times the median
