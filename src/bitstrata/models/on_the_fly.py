"""Quantizing a model that transformers has just loaded, in place, without calibration.

    AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=BitstrataConfig(bits="2-4"))

The way of other quantizers of transformers. What learns from a text is better at few bits: `bitstrata.quantize`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..arguments import number, parse_bits
from ..checkpoint import LayerSpec, QuantizationSpec, format_version
from ..errors import ModelError, UsageError
from ..nn import BitsState, PlaneLinear
from ..progress import Steps
from ..solvers import Method, make_method
from .discover import discover, set_submodule, submodule
from .experts import experts_of


@dataclass(frozen=True)
class Recipe:
    """How to quantize: what `bitstrata.quantize` has of the same names."""

    bits: tuple[int, ...]
    method: Method
    group_size: int
    skip: tuple[str, ...]

    @classmethod
    def parse(
        cls,
        bits: str | int | Iterable[int],
        method: str,
        preset: str,
        group_size: int,
        options: Mapping[str, Any] | None,
        skip: str | Sequence[str],
    ) -> Recipe:
        """Raises UsageError for what cannot be used, and for a method that learns from a text."""
        made = make_method(method, preset, options or {})
        if made.needs_calibration:
            raise UsageError(
                f"{method} with preset {preset} learns from a text, which from_pretrained has none of",
                hint='leave preset="fast", or use bitstrata.quantize(MODEL, OUT, calibration=...) and load OUT',
            )
        chosen = parse_bits(bits)
        if len(chosen) > 1 and not made.nests:
            raise UsageError(f"method {method} makes one precision, not {len(chosen)}", hint="give one number of bits")
        patterns = (skip,) if isinstance(skip, str) else tuple(skip)
        return cls(chosen, made, number("group_size", group_size, 1), patterns)

    def to_dict(self) -> dict[str, Any]:
        return {"bits": list(self.bits), "method": self.method.name, "group_size": self.group_size}


def quantize_in_place(model: PreTrainedModel, recipe: Recipe) -> QuantizationSpec:
    """Put planes of its linears in their places; a layer at a time, on the device that it is on.

    Raises ModelError for experts, which are not linears of their own, and as `discover`.
    """
    found = discover(model, recipe.skip)
    if experts_of((linear.name for linear in found.linears), model):
        raise ModelError(
            "experts are not quantized while transformers loads them",
            hint="use bitstrata.quantize, and load its result",
        )
    kind = recipe.method.scales_kind(recipe.bits)
    layers = {
        linear.name: LayerSpec(
            in_features=linear.in_features, out_features=linear.out_features, bias=linear.bias, decoder=kind
        )
        for linear in found.linears
    }
    spec = QuantizationSpec(
        format_version=format_version(layers.values()),
        method=recipe.method.name,
        bits=list(recipe.bits),
        group_size=recipe.group_size,
        layers=layers,
        provenance={"model": str(model.name_or_path), "calibration": None},
    )
    state = BitsState(dict.fromkeys(layers, recipe.bits))
    with Steps("quantizing", len(found.linears), "layer") as steps, torch.no_grad():
        for linear in found.linears:
            module: Any = submodule(model, linear.name)
            weight = module.weight.T if linear.transposed else module.weight
            solved = recipe.method.solve_layer(weight.detach(), recipe.bits, recipe.group_size)
            layer = PlaneLinear.from_weight(solved, module.bias, name=linear.name, state=state, dtype=weight.dtype)
            set_submodule(model, linear.name, layer.to(weight.device))
            steps.step(linear.name)
    return spec
