"""vLLM's routed experts, multiplied by planes: each token through the experts that its router chose.

A checkpoint has each projection of all experts as one set of tensors, experts first (FORMAT.md). vLLM's loader reads
them, a worker keeps its part, and nn/experts.py computes with them:

    gate_proj, up_proj    cut along output features
    down_proj             cut along input features, between groups; vLLM adds up what the workers have

An expert's rows run at the bits of their tokens. vLLM routes, adds shared experts, and scales. Experts that are spread
over workers (expert parallelism) are refused: those get tokens of other workers, whose bits they do not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.model_executor.layers.activation import get_act_and_mul_fn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from ...checkpoint.schema import expert_name
from ...errors import CheckpointError, UsageError
from ...nn import Assignment, BitsState, Experts, PlaneLinear
from ...nn.bits import Choice
from . import product
from .parameters import Load, Loading, add_guard, add_parameters, steady_kernel, take_stored
from .rows import LayerRows, Rows
from .stored import Stored
from .words import with_hints

PROJECTIONS = GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
ACTIVATIONS = {
    MoEActivation.SILU: "silu",
    MoEActivation.GELU: "gelu",
    MoEActivation.GELU_TANH: "gelu_pytorch_tanh",
    MoEActivation.SWIGLUOAI: "swigluoai",
}


class PlaneExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """y = the sum of a token's experts, by score: of each down(act(gate(x), up(x))), biases with them if there are any.

    Args:
        stored: of gate_proj, up_proj and down_proj; bias: whether they have one.
        rows: of the model; bits_of: of each expert's linears, for each choice of a row.
    """

    def __init__(
        self, moe: Any, stored: dict[str, Stored], bias: bool, rows: Rows, bits_of: Mapping[str, Sequence[int]]
    ) -> None:
        super().__init__(moe)
        self.stored, self.bias, self.rows, self.bits_of = stored, bias, rows, bits_of

    @with_hints()
    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Parameters for the part of the experts that this worker holds; UsageError where that cannot be computed."""
        title = next(iter(self.stored.values())).title.rpartition(".")[0]
        check_layer(layer, title)
        inner, workers = intermediate_size_per_partition, layer.moe_config.tp_size
        shapes = {GATE: (inner, hidden_size), UP: (inner, hidden_size), DOWN: (hidden_size, inner)}
        self.columns = {name: columns for name, (_, columns) in shapes.items()}
        self.dtype, self.count = params_dtype, num_experts
        for name, stored in self.stored.items():
            rows, columns = shapes[name]
            whole = (rows, columns * workers) if name == DOWN else (rows * workers, columns)
            if (stored.outputs[0], stored.in_features, stored.experts) != (*whole, num_experts):
                raise UsageError(
                    f"{stored.title}: the checkpoint has {stored.experts} experts of {stored.outputs[0]} x "
                    f"{stored.in_features} weights, vLLM's layer {num_experts} of {rows} x {columns} on each of "
                    f"{workers} workers"
                )
            stored.check_cut(columns, workers)
            part = nn.Module()
            cut = partial(_load_part, "input_dim" if name == DOWN else "output_dim", layer.moe_config.tp_rank, workers)
            add_parameters(part, stored, rows, columns, cut)
            add_guard(part, params_dtype)
            if self.bias:
                only_one = partial(_load_bias_once, layer.moe_config.tp_rank)
                add_bias(part, torch.empty(num_experts, rows, dtype=params_dtype), only_one if name == DOWN else cut)
            layer.add_module(name, part)
        # of this layer alone: vLLM's own takes names of experts that are stored apart
        layer.load_weights = partial(_load_weights, layer)
        layer.product_key = product.hold_place(f"bitstrata:{title}", layer)

    @with_hints()
    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack what was loaded for the kernel that runs here."""
        if hasattr(layer, "product"):
            return
        names = {
            name: [expert_name(stored.title, expert) for expert in range(self.count)]
            for name, stored in self.stored.items()
        }
        held = {one: self.stored[name].bits for name, ones in names.items() for one in ones}
        state = BitsState(held)
        linears = {}
        for name, stored in self.stored.items():
            part = layer.get_submodule(name)
            bias = getattr(part, "bias", None)
            linears[name] = [
                PlaneLinear.from_weight(
                    weight, None if bias is None else bias.data[e], name=names[name][e], state=state, dtype=self.dtype
                )
                for e, weight in enumerate(take_stored(part, stored, self.columns[name]))
            ]
            kernel = steady_kernel(part.weight.device.type, self.dtype)
            for linear in linears[name]:
                linear.pack(kernel)
            delattr(layer, name)
        activation = get_act_and_mul_fn(ACTIVATIONS[layer.activation], compile_native=False)
        experts = Experts(
            nn.Module(),
            count=self.count,
            gated=True,
            activation=lambda _, joined: activation(joined),
            interleaved=layer.activation == MoEActivation.SWIGLUOAI,
            presorted=False,
            merged=(),
        )
        experts.set_linears(linears)
        choices = tuple(zip(*(self.bits_of[one] for one in held), strict=True))
        layer.product = ExpertsProduct(experts, state, self.rows.of_choices(), choices)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: it says how vLLM's own kernels are called."""

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """x [rows, H], and of each row its experts and their scores [rows, k] -> [rows, H], this worker's part."""
        return product.experts(layer, x, topk_weights, topk_ids)


class ExpertsProduct:
    """The experts of one layer, where they are multiplied.

    Args:
        choices: the bits of all linears of `state`, for each choice of a row.
    """

    def __init__(self, experts: Experts, state: BitsState, rows: LayerRows, choices: tuple[Choice, ...]) -> None:
        self.experts, self.state, self.rows, self.choices = experts, state, rows, choices

    def run(self, x: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        """x [rows, H], scores and chosen [rows, k] -> [rows, H]."""
        now = product.bits_of(self.rows, len(x))
        if isinstance(now, int):
            assigned = Assignment(None, (self.choices[now],))
        else:
            assigned = Assignment(None, self.choices, now.long())
        with self.state.using(assigned):
            y: Tensor = self.experts(x, chosen, scores)
        return y


def check_layer(layer: Any, title: str) -> None:
    """Raise UsageError for experts that are computed in a way that is not here."""
    config, parallel = layer.moe_config, layer.moe_config.moe_parallel_config
    if parallel.use_ep or parallel.dp_size > 1:
        raise UsageError(
            f"{title}: experts in planes cannot be spread over workers, nor run with data parallelism",
            hint="do without --enable-expert-parallel and --data-parallel-size: tensor and pipeline parallelism work",
        )
    if layer.activation not in ACTIVATIONS or layer.apply_router_weight_on_input or config.swiglu_limit is not None:
        raise UsageError(
            f"{title}: experts with the activation {layer.activation.value}, a limit of it, or scores on their inputs "
            "are not supported in vLLM",
            hint="use `bitstrata serve`",
        )
    if get_current_vllm_config().compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
        raise UsageError(
            f"{title}: tokens are sorted by expert on the host, which CUDA graphs cannot record",
            hint="add --enforce-eager",
        )


def add_bias(part: nn.Module, values: Tensor, load: Load) -> None:
    """Give `part` the biases of all experts [E, N], to be filled by `load`."""
    bias = nn.Parameter(values, requires_grad=False)
    bias.output_dim = 1  # type: ignore[attr-defined]
    bias.weight_loader = Loading(load)  # type: ignore[attr-defined]
    part.register_parameter("bias", bias)


def _load_part(along: str, rank: int, workers: int, parameter: nn.Parameter, loaded: Tensor) -> None:
    """Copy the part of worker `rank` of what was loaded, cut along one of the parameter's dimensions if it has it."""
    dim = getattr(parameter, along, None)
    if dim is not None and workers > 1:
        size = parameter.shape[dim]
        loaded = loaded.narrow(dim, rank * size, size)
    if loaded.shape != parameter.shape:
        raise CheckpointError(f"a tensor of shape {list(loaded.shape)} is stored, expected {list(parameter.shape)}")
    parameter.data.copy_(loaded)


def _load_bias_once(rank: int, parameter: nn.Parameter, loaded: Tensor) -> None:
    """The whole bias on the first worker and none on the others, for their outputs are added up."""
    _load_part("", 0, 1, parameter, loaded if rank == 0 else torch.zeros_like(loaded))


def _load_weights(layer: Any, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """Fill the parameters of `layer` from tensors with names like gate_proj.plane_0; the names of what was filled.

    Some of vLLM's models have other words for the projections by then, which the layer knows.
    """
    words = {layer.ckpt_gate_proj_name: GATE, layer.ckpt_up_proj_name: UP, layer.ckpt_down_proj_name: DOWN}
    parameters = dict(layer.named_parameters())
    for name, loaded in weights:
        projection, _, end = name.removeprefix("routed_experts.").partition(".")
        found = f"{words.get(projection, projection)}.{end}"
        if found not in parameters:
            raise CheckpointError(f"{layer.layer_name}: the checkpoint has {name}, which vLLM's layer lacks")
        parameters[found].weight_loader(parameters[found], loaded)
        yield found
