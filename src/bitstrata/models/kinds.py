"""What a module in a decoder block is: a linear layer to quantize, experts, or something that stays as it is, and why.

Told by what a module is and by its place, not by its architecture:

    router                  decides which experts run: a module or a linear called so, or `gate` beside experts
    indexer                 decides which tokens attention sees
    decay, time step        what a recurrent state forgets by, multiplied up over all tokens
    few outputs             below 16, or below 128 and a sixteenth of the inputs, and no attention head: one number a
                            head or an expert; its bytes are few, and what it scales is everything
    few inputs              below 16: a plane holds 32 columns a word
    convolution             short, a weight a channel

Everything else that is linear is quantized: latent (MLA) projections, shared experts, fused projections, low ranks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from .compat import is_plain_linear

FEW, NARROW, SHARE = 16, 128, 16  # outputs or inputs; outputs; inputs for each output
# parts of a name, outermost first -> why what lies below is not quantized
_PLACES = (
    (re.compile(r"(.*_)?router(_.*)?"), "router"),
    (re.compile(r"indexer"), "indexer: picks the tokens that attention sees"),
    (re.compile(r"shared_expert_gate"), "gate of the shared expert"),
    (re.compile(r"forget_gate|dt_proj|dt_bias|A_log|[fi]gate_preact|f_[ab]_proj"), "decay or time step of a state"),
    (re.compile(r"in_proj_(a|b|ba)"), "decay or gate, one number a head"),
)
_ROUTER = re.compile(r".*(Router|TopkGate|TopKGate)")


@dataclass(frozen=True)
class LinearInfo:
    """A quantizable linear layer: y = x @ W^T + bias with W [out_features, in_features].

    `transposed` says that the source stores W^T (Conv1D).
    """

    name: str
    in_features: int
    out_features: int
    bias: bool
    transposed: bool
    block: int


def linear_info(name: str, module: nn.Module, block: int) -> LinearInfo | None:
    """`module` as a LinearInfo, or None if it is not a linear layer we know."""
    if isinstance(module, Conv1D):
        columns, rows = module.weight.shape
        return LinearInfo(name, columns, rows, module.bias is not None, True, block)
    if isinstance(module, nn.Linear) and is_plain_linear(type(module)):
        return LinearInfo(name, module.in_features, module.out_features, module.bias is not None, False, block)
    return None


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds the matrices of several experts, merged into parameters of three dimensions."""
    own = module.parameters(recurse=False)
    return type(module).__name__.endswith("Experts") and any(parameter.dim() == 3 for parameter in own)


def place_reason(block: nn.Module, name: str) -> str | None:
    """Why what is called `name` in `block` is not quantized, by its place; None if it may be."""
    around: nn.Module | None = block
    for part in name.split("."):
        for pattern, reason in _PLACES:
            if pattern.fullmatch(part):
                return reason
        inner = getattr(around, part, None)
        if part == "gate" and around is not None and hasattr(around, "experts"):
            return "router"
        if _ROUTER.fullmatch(type(inner).__name__):
            return "router"
        around = inner if isinstance(inner, nn.Module) else None
    return None


def size_reason(linear: LinearInfo, head_width: int | None) -> str | None:
    """Why a linear of this size is not quantized; None if it is."""
    if linear.in_features < FEW:
        return f"fewer than {FEW} inputs"
    if head_width is not None and linear.out_features >= head_width:
        return None
    if linear.out_features < FEW:
        return f"fewer than {FEW} outputs"
    if linear.out_features < NARROW and linear.out_features * SHARE <= linear.in_features:
        return f"fewer than {NARROW} outputs of many inputs: a gate, a decay or a low rank"
    return None


def parameter_reason(block: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why a parameter `name` of a block's `module`, which is no linear, stays as it is; None if that needs no words.

    Vectors that are a weight or a bias are norms and the like.
    """
    leaf = name.rpartition(".")[2]
    parameter = getattr(module, leaf)
    if parameter.dim() < 2 and leaf in ("weight", "bias"):
        return None
    reason = place_reason(block, name)
    if reason is not None:
        return reason
    if "Conv" in type(module).__name__ and not isinstance(module, Conv1D):
        return "convolution"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear):
        return f"a {type(module).__name__}, no plain nn.Linear"
    return f"parameter of a {type(module).__name__}, no linear layer"


def head_width(block: nn.Module, name: str) -> int | None:
    """Outputs of a head, if the linear `name` of `block` is part of attention, whose projections have no fewer."""
    width = getattr(block.get_submodule(name.rpartition(".")[0]), "head_dim", None)
    return width if isinstance(width, int) else None
