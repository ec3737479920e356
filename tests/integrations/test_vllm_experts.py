"""Experts of the vLLM plugin without a server: products against float64, the parts of workers, and what is refused."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import largest_error, random_weight
from torch import nn

from bitstrata.errors import CheckpointError, UsageError
from bitstrata.integrations.vllm.rows import Rows
from bitstrata.integrations.vllm.stored import Stored
from bitstrata.planes.decode import decode

pytestmark = pytest.mark.vllm
HIDDEN, INNER, COUNT, CHOSEN, GROUP, BITS = 72, 128, 5, 2, 32, (2, 3, 4)
# of each linear at the choices of a row: uniform ones, and a plan that differs by expert and projection
CHOICES = {
    f"mlp.experts.{expert}.{name}": (*BITS, BITS[(expert + place) % len(BITS)])
    for expert in range(COUNT)
    for place, name in enumerate(("gate_proj", "up_proj", "down_proj"))
}
SHAPES = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}


def random_experts(kind: str, seed: int):
    """Projection -> a weight for each expert, and a bias for each [E, N]."""
    made, biases = {}, {}
    for place, (name, (rows, columns)) in enumerate(SHAPES.items()):
        numbers = [seed + 100 * place + expert for expert in range(COUNT)]
        made[name] = [random_weight(rows, columns, BITS, GROUP, kind, number) for number in numbers]
        biases[name] = torch.randn(COUNT, rows, generator=torch.Generator().manual_seed(seed + place))
    return made, biases


def tensors_of(experts, biases):
    """The tensors of a checkpoint, named as vLLM's layer gets them."""
    for name, weights in experts.items():
        yield f"{name}.weight", torch.empty(0)
        for end in weights[0].tensors():
            yield f"{name}.{end}", torch.stack([weight.tensors()[end] for weight in weights])
        if biases is not None:
            yield f"{name}.bias", biases[name]


def layer_of(rank: int = 0, workers: int = 1, activation: str = "silu", **parallel) -> nn.Module:
    """As much of vLLM's RoutedExperts as the method reads."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    layer = nn.Module()
    layer.activation, layer.apply_router_weight_on_input = MoEActivation(activation), False
    layer.layer_name = "mlp.experts"
    layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name = "w1", "w3", "w2"
    spread = SimpleNamespace(**{"use_ep": False, "dp_size": 1, **parallel})
    layer.moe_config = SimpleNamespace(
        tp_rank=rank, tp_size=workers, swiglu_limit=None, moe_parallel_config=spread, num_experts=COUNT
    )
    return layer


def created(layer: nn.Module, kind: str = "affine", bias: bool = False, group: int = GROUP):
    from vllm.config import VllmConfig, set_current_vllm_config

    from bitstrata.integrations.vllm.experts import PlaneExpertsMethod

    stored = {
        name: Stored((f"mlp.experts.{name}",), (rows,), columns, group, kind, BITS, COUNT)
        for name, (rows, columns) in SHAPES.items()
    }
    method = PlaneExpertsMethod(layer.moe_config, stored, bias, Rows({}, len(BITS) + 1, default=0), CHOICES)
    with set_current_vllm_config(VllmConfig()):
        inner = INNER // layer.moe_config.tp_size
        method.create_weights(layer, COUNT, HIDDEN, inner, torch.float32, weight_loader=None)
    for parameter in layer.parameters():  # what nobody writes must be noticed
        if parameter.is_floating_point():
            parameter.data.fill_(math.nan)
    return method


def loaded(method, layer: nn.Module, tensors) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    list(layer.load_weights(tensors))
    with set_current_vllm_config(VllmConfig()):
        method.process_weights_after_loading(layer)


def exact(experts, biases, x, scores, chosen, choices, activation):
    """Float64, token by token."""
    y = torch.zeros(len(x), HIDDEN, dtype=torch.float64)

    def linear(name, expert, choice, row):
        value = CHOICES[f"mlp.experts.{expert}.{name}"][choice]
        found = decode(experts[name][expert], value, torch.float64) @ row
        return found if biases is None else found + biases[name][expert].double()

    for token, row in enumerate(x.double()):
        for expert, score in zip(chosen[token].tolist(), scores[token].double(), strict=True):
            gate, up = (linear(name, expert, choices[token], row) for name in ("gate_proj", "up_proj"))
            if activation == "swigluoai":
                gate, up = gate.clamp(max=7), up.clamp(-7, 7)
                inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            elif activation == "silu":
                inner = gate * torch.sigmoid(gate) * up
            else:
                inner = nn.functional.gelu(gate, approximate="tanh") * up
            y[token] += score * linear("down_proj", expert, choices[token], inner)
    return y


@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("kind", "activation", "bias"),
    [("affine", "silu", False), ("affine8", "swigluoai", True), ("codebook", "gelu_tanh", False)],
    ids=["affine", "affine8-biases", "codebook"],
)
def test_workers_add_up_to_what_the_decoded_experts_compute(kind, activation, bias, workers, tokens, seed):
    experts, biases = random_experts(kind, seed % 1000)
    biases = biases if bias else None
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=draw) / HIDDEN**0.5
    chosen = torch.rand(tokens, COUNT, generator=draw).argsort(1)[:, :CHOSEN].int()
    scores = torch.rand(tokens, CHOSEN, generator=draw)
    choices = [3 - token % 4 for token in range(tokens)]  # the plan first
    parts = []
    for rank in range(workers):
        layer = layer_of(rank, workers, activation)
        method = created(layer, kind, bias)
        loaded(method, layer, tensors_of(experts, biases))
        method.rows.hold_buffer(tokens, "cpu")[0] = torch.tensor(choices, dtype=torch.int8)
        parts.append(method.apply(layer, x, scores, chosen))
    expected = exact(experts, biases, x, scores, chosen, choices, activation)
    assert largest_error(sum(parts), expected) < 2e-5 * expected.abs().max().item()  # three products in float32


def test_what_a_checkpoint_lacks_or_has_too_much_is_named():
    experts, _ = random_experts("affine", 0)
    layer = layer_of()
    method = created(layer)
    kept = [(name, tensor) for name, tensor in tensors_of(experts, None) if name != "up_proj.plane_1"]
    with pytest.raises(CheckpointError, match=r"plane_1 of mlp\.experts\.up_proj: read for 0 of 1 layers"):
        loaded(method, layer, kept)
    with pytest.raises(CheckpointError, match=r"the checkpoint has up_proj\.bias, which vLLM's layer lacks"):
        list(layer.load_weights([("up_proj.bias", torch.zeros(COUNT, INNER))]))
    with pytest.raises(CheckpointError, match=r"a tensor of shape \[4, 72, 4\] is stored, expected \[5, 72, 4\]"):
        list(layer.load_weights([("w2.plane_0", torch.zeros(4, HIDDEN, 4, dtype=torch.int32))]))


@pytest.mark.parametrize(
    ("parallel", "said"),
    [({"use_ep": True}, "cannot be spread over workers"), ({"dp_size": 2}, "nor run with data parallelism")],
    ids=["experts", "data"],
)
def test_experts_that_get_tokens_of_other_workers_are_refused(parallel, said):
    with pytest.raises(UsageError, match=said):
        created(layer_of(**parallel))


def test_experts_of_another_kind_or_size_or_cut_are_refused():
    with pytest.raises(UsageError, match="the activation swiglustep"):
        created(layer_of(activation="swiglustep"))
    with pytest.raises(UsageError, match="5 experts of 128 x 72 weights, vLLM's layer 5 of 42 x 72 on each of 3"):
        created(layer_of(workers=3))
    with pytest.raises(UsageError, match=r"down_proj: 128 input features cannot be cut for 2 workers: .* groups of 48"):
        created(layer_of(workers=2), group=48)


def test_a_compiler_sees_one_op():
    from torch._subclasses.fake_tensor import FakeTensorMode

    importlib.import_module("bitstrata.integrations.vllm.product")  # has the op
    with FakeTensorMode():
        x, scores, chosen = torch.empty(7, HIDDEN), torch.empty(7, 2), torch.empty(7, 2, dtype=torch.int32)
        assert torch.ops.bitstrata.served_experts(x, scores, chosen, "key").shape == (7, HIDDEN)
