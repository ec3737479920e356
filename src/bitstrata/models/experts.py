"""Mixtures of experts: which modules they are, how their matrices lie in files, and linears in their places.

transformers merges the experts of a block into parameters of three dimensions, in few layouts that the module says:

    gate_up_proj [E, 2I, H], down_proj [E, H, I]    gate's rows, then up's; most models
    transposed                                      [E, H, 2I] and [E, I, H]
    interleaved                                     rows (or columns) of gate and up in turns
    no gate                                         up_proj [E, I, H]
    biases                                          <name>_bias [E, N]

`split_experts` puts nn/experts.py in their place, so that everything else sees linears. Files hold experts apart, in
which case each is a tensor like any other, or merged, in which case `Part` says which piece of a tensor it is.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoint import LayerSpec
from ..checkpoint.schema import expert_name
from ..errors import CheckpointError, UsageError
from ..nn import BitsState, Experts, StoredExperts
from .compat import is_merged, is_presorted, mark_initialized, own_gate

# what configs call the number of experts of a token
ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")
_MADE_OF = "_made_of"  # where experts keep the layout, device and dtype of what they stand for
GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"


@dataclass(frozen=True)
class Layout:
    """The experts of one module: how many, and how their matrices are merged.

    hidden: width of what they read; inner: of what down_proj reads; out: of what they give.
    """

    count: int
    hidden: int
    inner: int
    out: int
    gated: bool
    interleaved: bool
    transposed: bool
    bias: bool
    presorted: bool

    @property
    def merged(self) -> tuple[str, ...]:
        """The names of the merged parameters."""
        names = (GATE_UP if self.gated else UP, DOWN)
        return names + tuple(f"{name}_bias" for name in names if self.bias)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Projection -> [out_features, in_features] of its linears."""
        into = dict.fromkeys(("gate_proj", UP) if self.gated else (UP,), (self.inner, self.hidden))
        return {**into, DOWN: (self.out, self.inner)}


@dataclass(frozen=True)
class Part:
    """One expert's matrix or bias in a merged tensor: entry `expert` of `stored`, of which it is piece `piece` of
    `pieces`, one after the other or `interleaved`; [N, K], stored `transposed` or not, or [N]."""

    stored: str
    expert: int
    piece: int
    pieces: int
    interleaved: bool
    transposed: bool
    shape: tuple[int, ...]

    def of(self, entry: Tensor) -> Tensor:
        """The part of entry `expert` of the merged tensor."""
        outputs_first = entry.T if self.transposed else entry
        size = self.shape[0]
        if self.interleaved:
            return outputs_first[self.piece :: self.pieces]
        return outputs_first[self.piece * size : (self.piece + 1) * size]


def layout_of(module: nn.Module) -> Layout | None:
    """How the experts of `module` are merged; None if it has none, or in a layout that is not known."""
    held = dict(module.named_parameters(recurse=False))
    down = held.get(DOWN)
    into = held.get(GATE_UP, held.get(UP))
    presorted = is_presorted(module)
    if down is None or into is None or down.dim() != 3 or into.dim() != 3:
        return None
    if not presorted and not is_merged(module):
        return None
    gated = GATE_UP in held
    transposed = presorted or bool(getattr(module, "is_transposed", False))
    bias = bool(getattr(module, "has_bias", False))
    found = Layout(
        count=down.shape[0],
        hidden=into.shape[1 if transposed else 2],
        inner=down.shape[1 if transposed else 2],
        out=down.shape[2 if transposed else 1],
        gated=gated,
        interleaved=gated and not getattr(module, "is_concatenated", True),
        transposed=transposed,
        bias=bias,
        presorted=presorted,
    )
    rows = into.shape[2 if transposed else 1]
    fits = into.shape[0] == found.count and rows == found.inner * (2 if gated else 1)
    return found if fits and set(found.merged) == {name for name, p in held.items() if p.dim() > 1} else None


def _experts(module: nn.Module, layout: Layout) -> Experts:
    return Experts(
        module,
        count=layout.count,
        gated=layout.gated,
        interleaved=layout.interleaved,
        activation=own_gate(module),
        presorted=layout.presorted,
        merged=layout.merged,
    )


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def split_experts(model: PreTrainedModel) -> dict[str, Layout]:
    """Put linears, on meta, in the place of all experts in a known layout: names of the modules -> layouts."""
    found = {name: layout for name, module in model.named_modules() if (layout := layout_of(module)) is not None}
    for name, layout in found.items():
        original = model.get_submodule(name)
        dtype = original.get_parameter(DOWN).dtype
        experts = _experts(original, layout)
        experts.set_linears(
            {
                projection: [
                    nn.Linear(columns, rows, bias=layout.bias, device="meta", dtype=dtype) for _ in range(layout.count)
                ]
                for projection, (rows, columns) in layout.shapes.items()
            }
        )
        _put(model, name, experts)
    return found


def experts_of(names: Iterable[str], model: nn.Module) -> dict[str, tuple[str, int]]:
    """Of these linears the experts': name -> (the name of the layer that stores them all, how many there are)."""
    counts = {name: module.expert_count for name, module in model.named_modules() if isinstance(module, Experts)}
    found = {}
    for name in names:
        module, _, projection = name.rpartition(".")
        module = module.rpartition(".")[0]
        if module in counts:
            found[name] = f"{module}.{projection}", counts[module]
    return found


def check_all_experts(model: nn.Module, quantized: Container[str], kept: Mapping[str, str]) -> None:
    """Raise UsageError unless every linear of experts is quantized: they are stored, and put in place, together.

    Args:
        quantized: names of the weights that are; kept: of the others, why not.
    """
    for around, module in model.named_modules():
        if not isinstance(module, Experts):
            continue
        for name, _ in module.named_parameters():
            full = f"{around}.{name}"
            if name.endswith("_proj.weight") and full in kept and full not in quantized:
                raise UsageError(
                    f"{full.removesuffix('.weight')} would stay as it is ({kept[full]}), but the experts of a layer "
                    "are quantized together",
                    hint="leave experts out of --skip; a plan may give each expert bits of its own",
                )


def active_experts(config: PreTrainedConfig, count: int) -> int | None:
    """Through how many of `count` experts a token goes, by whichever name the config has for it; or None."""
    text = config.get_text_config(decoder=True)
    found = [getattr(text, name, None) for name in ACTIVE]
    return next((active for active in found if isinstance(active, int) and 1 <= active <= count), None)


def parts_of(module: str, layout: Layout, key: str, stored: str, shape: tuple[int, ...]) -> dict[str, Part]:
    """The linears' parameters in the tensor `stored` of this shape, which is parameter `key` of a merged module.

    Nothing if it cannot be that parameter.
    """
    is_bias = key.endswith("_bias")
    name = key.removesuffix("_bias")
    projections = ("gate_proj", UP) if name == GATE_UP else (name,)
    rows, columns = layout.shapes[projections[-1]]
    outputs = rows * len(projections)
    transposed = layout.transposed and not is_bias
    expected = (layout.count, outputs) if is_bias else (layout.count, outputs, columns)
    turned = (layout.count, columns, outputs)
    if transposed:
        expected, turned = turned, (layout.count, outputs, columns)
    if shape != expected and not is_bias and shape == turned:
        transposed = not transposed  # older files of some models; transformers turns them by their shape, too
    elif shape != expected:
        return {}
    own = (rows,) if is_bias else (rows, columns)
    end = "bias" if is_bias else "weight"
    return {
        f"{module}.{expert}.{projection}.{end}": Part(
            stored, expert, piece, len(projections), layout.interleaved and len(projections) > 1, transposed, own
        )
        for expert in range(layout.count)
        for piece, projection in enumerate(projections)
    }


def linear_name(merged: str, expert: int, piece: int, pieces: int) -> str:
    """What the tensor is called that transformers makes piece `piece` of expert `expert` in the parameter `merged`."""
    module, _, key = merged.rpartition(".")
    projection = ("gate_proj", UP)[piece] if pieces == 2 else key
    return f"{module}.{expert}.{projection}.weight"


def put_stored_experts(
    model: PreTrainedModel,
    name: str,
    known: str,
    layer: LayerSpec,
    state: BitsState,
    paged: bool,
    shared: Mapping[str, Any],
) -> None:
    """Put planes of all experts in the place of a projection, `<module>.<projection>` in the model.

    name: what the layer is called in the model; known: in the checkpoint. shared: group_size, kind and bits.
    Raises CheckpointError unless the model has experts of these sizes there.
    """
    module_name, _, projection = name.rpartition(".")
    try:
        module = model.get_submodule(module_name)
    except AttributeError:
        module = nn.Module()
    layout = layout_of(module)
    if layout is not None:
        weight = module.get_parameter(DOWN)
        experts = _experts(module, layout)
        experts.__dict__[_MADE_OF] = layout, weight.device, weight.dtype
        if layout.gated:
            experts.__dict__[GATE_UP] = weight.new_empty(0)  # some models look at it when they fill what is not stored
        _put(model, module_name, experts)
        module = experts
    if _MADE_OF not in module.__dict__:
        raise CheckpointError(f"the checkpoint has experts in {known}, which {type(model).__name__} lacks")
    layout, device, dtype = module.__dict__[_MADE_OF]
    shape = layout.shapes.get(projection)
    expected = (layer.experts, (layer.out_features, layer.in_features), layer.bias)
    if (layout.count, shape, layout.bias) != expected:
        raise CheckpointError(
            f"{known}: the checkpoint has {layer.experts} experts of [{layer.out_features}, {layer.in_features}] and "
            f"{'a' if layer.bias else 'no'} bias, the model has {layout.count} of {list(shape or ())}"
        )
    stored = StoredExperts(
        layer.in_features,
        layer.out_features,
        name=known,
        names=[expert_name(known, expert) for expert in range(layout.count)],
        share=layer.read_at_once / layout.count,
        state=state,
        bias=layer.bias,
        paged=paged,
        device=device,
        dtype=dtype,
        **shared,
    )
    mark_initialized(stored)
    module.add_module(projection, stored)


def check_whole(model: PreTrainedModel) -> None:
    """Raise CheckpointError if some projections of a module of experts have planes and others have not."""
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            missing = [projection for projection in module.projections if projection not in module._modules]
            if missing and "0" not in module._modules:
                raise CheckpointError(f"the checkpoint has planes of {name}, but none of {name}.{missing[0]}")


_EXPERT = re.compile(r"\.(\d+)\.")


def expert_index(name: str) -> int | None:
    """The number of the expert in the name of a tensor of one expert: the last number in it."""
    found = _EXPERT.findall(name)
    return int(found[-1]) if found else None
