"""Passes of a chain over a block: no product is made twice, and what they give is what the whole block gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_llama, tiny_mixtral
from torch import Tensor, nn

from bitstrata.calibration import BlockRunner
from bitstrata.calibration.lanes import batches
from bitstrata.models import SourceModel, discover
from bitstrata.quantization.block_task import BlockTask
from bitstrata.quantization.passes import Passes

WINDOWS, LENGTH, BATCH = 10, 12, 2
BUILDS: dict[str, Callable[..., Path]] = {"llama": tiny_llama, "gpt2": tiny_gpt2, "mixtral": tiny_mixtral}


def task_of(folder: Path, dtype: torch.dtype, block: nn.Module, runner: BlockRunner, seed: int) -> BlockTask:
    """Block 1 of a model, on windows of random hidden states."""
    linears = runner.discovery.of_block(1)
    name = runner.discovery.blocks[1]
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(WINDOWS, LENGTH, runner.model.config.hidden_size, generator=generator)
    weights = {}
    for linear in linears:
        weight = block.get_submodule(linear.name.removeprefix(f"{name}.")).weight
        assert isinstance(weight, Tensor)
        weights[linear.name] = (weight.T if linear.transposed else weight).detach().contiguous()
    return BlockTask(
        block=block,
        prefix=f"{name}.",
        weights=weights,
        transposed=frozenset(linear.name for linear in linears if linear.transposed),
        bits=(2, 4),
        group_size=32,
        call=lambda module, hidden: runner.call(1, module, hidden),
        inputs=inputs,
        targets=None,
        chains={bits: inputs + 2.0**-bits * torch.randn(inputs.shape, generator=generator) for bits in (2, 4)},
        generator=generator,
        say=lambda message: None,
        batch=BATCH,
        dtype=dtype,
        scratch=folder,
    )


def coarse(weight: Tensor, bits: int) -> Tensor:
    unit = weight.abs().max() / 2**bits
    return (weight / unit).round() * unit


@pytest.fixture(params=BUILDS)
def build(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def task(build: str, request: pytest.FixtureRequest, tmp_path: Path, seed: int) -> Iterator[BlockTask]:
    source = SourceModel(BUILDS[build](tmp_path / "model"))
    model = source.skeleton()
    runner = BlockRunner(source, model, discover(model), LENGTH, torch.device("cpu"))
    runner.embed(torch.randint(3, 60, (1, LENGTH)))
    (tmp_path / "scratch").mkdir()
    with runner.block(1) as block:
        yield task_of(tmp_path / "scratch", request.param, block, runner, seed)


def solve(task: BlockTask) -> dict[int, dict[str, Tensor]]:
    """Weights at each bits, found group by group as a method does it."""
    solved: dict[int, dict[str, Tensor]] = {bits: {} for bits in task.bits}
    for names in task.input_groups():
        task.moments(names, solved)
        for bits in task.bits:
            solved[bits].update({name: coarse(task.weights[name], bits) for name in names})
    return solved


def test_what_they_give_is_what_the_block_gives_to_the_last_bit(task: BlockTask) -> None:
    recorded = torch.cat(list(task.record()))
    assert torch.equal(recorded, torch.cat(list(task.outputs(task.weights, task.inputs))))  # type: ignore[arg-type]
    for bits, weights in solve(task).items():
        found = torch.cat(list(task.advance(bits, weights)))
        assert torch.equal(found, torch.cat(list(task.outputs(weights, task.chains[bits])))), f"{bits} bits"
    task.close()
    assert task.scratch is not None
    assert list(task.scratch.iterdir()) == []
    assert not any("forward" in module.__dict__ for module in task.block.modules())


def test_no_product_is_made_twice(task: BlockTask, build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except by experts, which return a sum of their linears' outputs and run in each pass."""
    task.input_groups()
    rows: Counter[str] = Counter()
    names = {name.removeprefix(task.prefix) for name in task.weights if ".experts." not in name}
    assert ("self_attn.q_proj" in names) or build != "mixtral"
    for name in names:
        linear = task.block.get_submodule(name)
        forward = type(linear).forward

        def counted(x: Tensor, *, name: str = name, linear: nn.Module = linear, forward: Any = forward) -> Tensor:
            rows[name] += x.shape[:-1].numel()
            return forward(linear, x)

        linear.forward = counted  # type: ignore[assignment]
    attention = Counter[str]()
    plain = torch.nn.functional.scaled_dot_product_attention

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        attention["calls"] += 1
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    for bits, weights in solve(task).items():
        for _ in task.advance(bits, weights):
            pass
    chains = 1 + len(task.bits)
    assert rows == dict.fromkeys(names, chains * WINDOWS * LENGTH)
    assert attention["calls"] == chains * len(batches(WINDOWS, BATCH))


def test_moments_are_those_of_whole_passes(task: BlockTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without modules that stand in for themselves."""
    solved = solve(task)
    group = task.input_groups()[-1]
    before = {bits: {name: w for name, w in of.items() if name not in group} for bits, of in solved.items()}
    found = []
    for whole in (False, True):
        again = BlockTask(**{f.name: getattr(task, f.name) for f in fields(task) if f.init})
        if whole:
            monkeypatch.setattr(Passes, "_ready", lambda *_: {})
        earlier: dict[int, dict[str, Tensor]] = {bits: {} for bits in task.bits}
        for names in again.input_groups()[:-1]:
            again.moments(names, earlier)
            for bits in task.bits:
                earlier[bits].update({name: before[bits][name] for name in names})
        found.append(again.moments(group, earlier))
    for bits in task.bits:
        assert torch.equal(found[0][bits].hessian, found[1][bits].hessian)
        assert torch.equal(found[0][bits].cross, found[1][bits].cross)
