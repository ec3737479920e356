"""Training of scales: the gradient is right, planes stay, and the loss never ends higher than it began."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from block_task import make_task
from torch import Tensor

from bitstrata.quantization.block_task import BlockTask
from bitstrata.solvers.bcq import base
from bitstrata.solvers.grouping import Grouping, to_scale
from bitstrata.solvers.reconstruct import LayerState, Training, _Affine, _mix, block_loss, reconstruct


def states(task: BlockTask, bits: int) -> dict[str, LayerState]:
    result = {}
    for name, weight in task.weights.items():
        grouping = Grouping(*weight.shape, task.group_size)
        planes, scale, offset = base(grouping.split(weight), grouping.mask(weight.device), bits, 4)
        result[name] = LayerState(grouping, planes.to(torch.int8), scale, offset)
    return result


def training(**changes: float) -> Training:
    usual = Training(12, 5e-3, batch_size=4, input_mix=0.5, train_offset=True)
    return dataclasses.replace(usual, **changes)  # type: ignore[arg-type]


def loss(task: BlockTask, layers: dict[str, LayerState], chain: Tensor) -> float:
    return block_loss(task, {name: layer.weight() for name, layer in layers.items()}, chain, 4)


@pytest.mark.parametrize("count", [1, 3])
def test_the_gradient_of_the_scales_is_that_of_its_formula(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    planes = (torch.rand(count, 5, 7, generator=generator) < 0.5).to(torch.int8) * 2 - 1
    scale = torch.randn(count, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, z: _Affine.apply(a, z, planes), (scale, offset)), f"seed {seed}"

    dense = offset.unsqueeze(1) + (scale.unsqueeze(2) * planes).sum(0)
    torch.testing.assert_close(_Affine.apply(scale, offset, planes), dense)
    weights = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad((dense * weights).sum(), (scale, offset))
    found = torch.autograd.grad((_Affine.apply(scale, offset, planes) * weights).sum(), (scale, offset))
    torch.testing.assert_close(found, wanted, msg=lambda text: f"seed {seed}: {text}")


def test_the_weight_of_a_layer_is_the_one_that_will_be_stored(seed: int) -> None:
    task = make_task((2,), seed=seed % 1000)
    for name, layer in states(task, 2).items():
        stored = LayerState(layer.grouping, layer.planes, to_scale(layer.scale).float(), to_scale(layer.offset).float())
        assert torch.equal(layer.weight(), stored.weight()), f"{name} (seed {seed})"
        assert layer.weight().shape == task.weights[name].shape


def test_the_block_loss_is_the_mean_squared_error(seed: int) -> None:
    task = make_task((2,), seed=seed % 1000)
    layers = states(task, 2)
    block, chain = task.block, task.chains[2]
    for name, layer in layers.items():
        block.get_submodule(name).weight.data = layer.weight()
    assert task.targets is not None
    expected = float((block(chain) - task.targets).double().square().mean())
    for batch in (1, 4, 100):
        found = block_loss(task, {name: layer.weight() for name, layer in layers.items()}, chain, batch)
        assert found == pytest.approx(expected, rel=1e-5), f"batches of {batch} (seed {seed})"


@pytest.mark.parametrize("learning_rate", [0.0, 1e-4, 5e-3, 0.1, 10.0, 1e30])
@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_training_never_returns_a_higher_loss(learning_rate: float, mix: float, seed: int) -> None:
    task = make_task((2,), seed=seed % 1000)
    layers = states(task, 2)
    began = loss(task, layers, task.chains[2])
    before, after = reconstruct(task, layers, task.chains[2], training(learning_rate=learning_rate, input_mix=mix))
    assert before == began
    assert after <= before, f"seed {seed}"
    assert loss(task, layers, task.chains[2]) == after, f"what is returned is not what was measured (seed {seed})"


def test_training_lowers_the_loss() -> None:
    for transposed in (False, True):
        task = make_task((2,), transposed=transposed)
        before, after = reconstruct(task, states(task, 2), task.chains[2], training(steps=60))
        assert after < 0.9 * before, f"transposed={transposed}"


@pytest.mark.parametrize("changes", [{"steps": 0}, {"learning_rate": 0.0}, {"learning_rate": 1e30}])
def test_training_that_cannot_help_leaves_the_start(changes: dict[str, float]) -> None:
    task = make_task((2,))
    layers, start = states(task, 2), states(task, 2)
    before, after = reconstruct(task, layers, task.chains[2], training(**changes))
    assert before == after
    for name, layer in layers.items():
        assert torch.equal(layer.scale, start[name].scale), name
        assert torch.equal(layer.offset, start[name].offset), name


def test_planes_and_the_block_itself_are_not_trained() -> None:
    task = make_task((3,))
    layers, start = states(task, 3), states(task, 3)
    originals = {name: parameter.clone() for name, parameter in task.block.named_parameters()}
    reconstruct(task, layers, task.chains[3], training(learning_rate=0.02))
    for name, layer in layers.items():
        assert torch.equal(layer.planes, start[name].planes), name
        assert not torch.equal(layer.scale, start[name].scale), name
    for name, parameter in task.block.named_parameters():
        assert torch.equal(parameter, originals[name]), f"{name} of the block was changed"


def test_offsets_are_trained_only_if_asked() -> None:
    for wanted in (True, False):
        task = make_task((2,))
        layers, start = states(task, 2), states(task, 2)
        reconstruct(task, layers, task.chains[2], training(learning_rate=0.02, train_offset=wanted))
        for name, layer in layers.items():
            assert torch.equal(layer.offset, start[name].offset) is not wanted, name


def test_the_same_generator_gives_the_same_result() -> None:
    results = []
    for _ in range(2):
        task = make_task((2,))
        layers = states(task, 2)
        reconstruct(task, layers, task.chains[2], training())
        results.append([layer.scale for layer in layers.values()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_mixing_takes_each_element_from_one_of_the_two() -> None:
    full, quantized = torch.zeros(50, 40, 10), torch.ones(50, 40, 10)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(_mix(full, quantized, 0.0, generator), full)
    assert torch.equal(_mix(full, quantized, 1.0, generator), quantized)
    mixed = _mix(full, quantized, 0.3, generator)
    assert bool(((mixed == 0) | (mixed == 1)).all())
    assert abs(float(mixed.mean()) - 0.3) < 0.02


def test_inputs_of_one_kind_only_are_not_touched_by_the_other() -> None:
    """input_mix 1 never reads the original's inputs; input_mix 0 never trains on the chain."""
    for mix in (0.0, 1.0):
        results = []
        for spoiled in (False, True):
            task = make_task((2,))
            layers = states(task, 2)
            assert task.inputs is not None
            if spoiled and mix == 1:
                task.inputs = torch.full_like(task.inputs, torch.nan)
            chain = task.chains[2] * (1.01 if spoiled and mix == 0 else 1)
            before, after = reconstruct(task, layers, chain, training(input_mix=mix))
            assert after < before
            results.append([layer.scale for layer in layers.values()])
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True)), f"input_mix {mix}"
