"""The interface every method implements: a block's weights in, a PlaneWeight for each linear out.

A method is a frozen options dataclass and a class with `quantize_block`. Most methods look at one
layer at a time and implement `quantize_layer` only.
"""

from __future__ import annotations

import dataclasses
from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..arguments import shown
from ..errors import UsageError
from ..planes import whole_number
from ..planes.weights import Kind, PlaneWeight
from .grouping import check_weight, join_rows, row_chunks

PRESETS = ("fast", "default", "best")


@dataclass(frozen=True)
class Tuning:
    """steps: of Adam; learning_rate: in units of a layer's last scale; batch_tokens: tokens a step."""

    steps: int
    learning_rate: float
    batch_tokens: int


@dataclass
class BlockTask:
    """One decoder block, ready to be quantized.

    Attributes:
        block: the module, fp32, with the original weights.
        weights: linear's name inside the block -> W fp32 [N, K].
        transposed: names whose parameter holds W^T.
        bits: the bits asked for, ascending.
        group_size: columns a group.
        call: hidden [b, S, hidden] -> the block's output, differentiable in the block's parameters.
        inputs: the full-precision chain's hidden states [n, S, hidden]; None without calibration.
        targets: the block's output on `inputs`; None without calibration.
        chains: bits -> the hidden states that the model quantized so far has at these bits.
        generator: the block's own source of randomness.
        say: where to report.
        fisher: linear's name -> sensitivity of the loss to each weight, fp32 [N, K]; None if the method needs none.
    """

    block: nn.Module
    weights: Mapping[str, Tensor]
    transposed: frozenset[str]
    bits: tuple[int, ...]
    group_size: int
    call: Callable[[nn.Module, Tensor], Tensor]
    inputs: Tensor | None
    targets: Tensor | None
    chains: Mapping[int, Tensor]
    generator: torch.Generator
    say: Callable[[str], None]
    fisher: Mapping[str, Tensor] | None = None


class Method(ABC):
    """A way to make planes and scales from weights.

    Class attributes:
        name: as in `--method`.
        options_type: its frozen dataclass of options.
        presets: preset name -> options that differ from the defaults.
        nests: whether one file can hold several precisions.
        scales: what its weights are decoded with, a kind of planes.weights.KINDS.
    """

    name: ClassVar[str]
    options_type: ClassVar[type]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    nests: ClassVar[bool] = True
    scales: ClassVar[Kind] = "affine"

    def __init__(self, options: Any = None) -> None:
        self.options = options if options is not None else self.options_type()

    def scales_kind(self, bits: tuple[int, ...]) -> Kind:
        """What a layer with these bits is decoded with."""
        return self.scales

    @property
    def needs_calibration(self) -> bool:
        """Whether these options need calibration text."""
        return False

    def layer_bytes(self, rows: int, columns: int, bits: tuple[int, ...]) -> int:
        """Memory that solving a layer [rows, columns] takes beyond the block itself, estimated."""
        return 0

    @property
    def tuning(self) -> Tuning | None:
        """How scales are tuned once every block is solved; None to leave them."""
        return None

    @property
    def needs_chains(self) -> bool:
        """Whether these options learn from the blocks' inputs: `inputs`, `targets`, `chains` of a task."""
        return self.needs_calibration

    @property
    def needs_fisher(self) -> bool:
        """Whether these options need the loss's gradients: `fisher` of a task. They take the whole model in memory."""
        return False

    def quantize_layer(self, weight: Tensor, bits: tuple[int, ...], group_size: int) -> PlaneWeight:
        """W [N, K] -> planes and affine scales for each of `bits`.

        Rows are independent, so they are solved in chunks that bound the memory. Raises ModelError
        for NaN, infinity, or weights beyond the range of fp16 scales.
        """
        check_weight("a weight", weight)
        chunks = row_chunks(len(weight), weight.shape[1], budget=1 << 21)
        return join_rows([self.quantize_rows(weight[rows].float(), bits, group_size) for rows in chunks])

    def quantize_rows(self, weight: Tensor, bits: tuple[int, ...], group_size: int) -> PlaneWeight:
        """`quantize_layer` for some rows: W fp32 [n, K], checked."""
        raise TypeError(f"{self.name} works on whole blocks, not on single layers")

    def quantize_block(self, task: BlockTask) -> dict[str, PlaneWeight]:
        """A PlaneWeight for every linear of the block, on the CPU."""
        return {name: self.quantize_layer(weight, task.bits, task.group_size) for name, weight in task.weights.items()}


def methods() -> dict[str, type[Method]]:
    """Every method by name."""
    from .anybcq import AnyBCQ
    from .anyprecision import AnyPrecision
    from .bcq import BCQ
    from .bpdq import BPDQ
    from .gptq import GPTQ
    from .nested import Nested
    from .rtn import RTN

    return {method.name: method for method in (AnyBCQ, AnyPrecision, BCQ, BPDQ, GPTQ, Nested, RTN)}


def make_method(name: str, preset: str, overrides: Mapping[str, str | Any]) -> Method:
    """The method `name` with the options of `preset` and `overrides` on top.

    `overrides` may hold strings from a command line; they are converted to the option's type.
    Raises UsageError for an unknown method, preset or option, or a value of the wrong type.
    """
    known = methods()
    if not isinstance(name, str) or name not in known:
        raise UsageError(f"unknown method {shown(name)}", hint=f"methods: {', '.join(sorted(known))}")
    if preset not in PRESETS:
        raise UsageError(f"unknown preset {shown(preset)}", hint=f"presets: {', '.join(PRESETS)}")
    if not isinstance(overrides, Mapping):
        raise UsageError(f"options must be a dictionary, got {shown(overrides)}", hint='such as {"steps": 500}')
    method = known[name]
    values: dict[str, Any] = dict(method.presets.get(preset, {}))
    fields = {field.name: field for field in dataclasses.fields(method.options_type)}
    for key, value in overrides.items():
        if key not in fields:
            raise UsageError(f"method {name} has no option {key!r}", hint=f"options: {', '.join(fields) or 'none'}")
        values[key] = _convert(f"option {key} of {name}", value, fields[key].default)
    try:
        return method(method.options_type(**values))
    except ValueError as error:
        raise UsageError(f"method {name}: {error}") from error


def _convert(what: str, value: Any, default: Any) -> Any:
    wanted = type(default)
    if not isinstance(value, str):
        whole = whole_number(value)
        if wanted is int and whole is not None:
            return whole
        if type(value) is wanted or (wanted is float and (whole is not None or isinstance(value, Real))):
            return wanted(value)
    elif wanted is bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    elif wanted is not bool:
        try:
            return wanted(value)
        except ValueError:
            pass
    raise UsageError(f"{what} must be {wanted.__name__}, got {shown(value)}", hint=f"the default is {default}")
