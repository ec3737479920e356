"""Which linear layers of a model are quantized, found without knowing the architecture, and replacing them.

The decoder blocks are the `ModuleList` with one entry a hidden layer (`num_hidden_layers`) in the
text model; what sees or hears is never touched. Every `nn.Linear` and every transformers `Conv1D`
(GPT-2's transposed linear) inside a block is a candidate; kinds.py says which of them stay as they
are. Everything that does is named with a reason, never silently.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint import LayerSpec
from ..errors import CheckpointError, ModelError, UsageError
from ..nn import BitsOrPlan, PlaneLinear, TiedHead
from .compat import name_changes
from .experts import check_all_experts
from .kinds import LinearInfo, head_width, is_experts, linear_info, parameter_reason, place_reason, size_reason


@dataclass(frozen=True)
class LeftOut:
    """A matrix that stays as it is, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Discovery:
    """The result of `discover`: block names in order, quantized linears, matrices left out, tied groups."""

    blocks: tuple[str, ...]
    linears: tuple[LinearInfo, ...]
    left_out: tuple[LeftOut, ...]
    tied: tuple[tuple[str, ...], ...]

    def of_block(self, index: int) -> tuple[LinearInfo, ...]:
        return tuple(linear for linear in self.linears if linear.block == index)

    @property
    def weight_count(self) -> int:
        """Weights in the quantized layers."""
        return sum(linear.in_features * linear.out_features for linear in self.linears)


def find_blocks(model: PreTrainedModel) -> str:
    """Name of the ModuleList that holds the decoder blocks. Raises ModelError if there is none.

    It is the list of the right length (`num_hidden_layers`, or `num_layers` where that is another) with the most
    weights in linears, of those that the text model itself owns: the innermost transformers model around it has the
    text model's kind of config, and a vision or audio tower of equal depth has its own.
    """
    text = model.config.get_text_config(decoder=True)
    layers = getattr(text, "num_hidden_layers", None)
    depths = (layers, getattr(text, "num_layers", layers))  # some count the attentions of a block as layers
    owners = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) not in depths:
            continue
        owner = next(part for part in _ancestors(name) if part in owners)
        linears = [info for child in module.modules() if (info := linear_info("", child, 0)) is not None]
        if linears and type(owners[owner].config) is type(text):
            sizes[name] = sum(info.in_features * info.out_features for info in linears)
    if sizes:
        return max(sizes, key=lambda name: sizes[name])
    others = sorted({type(module).__name__ for module in model.modules() if isinstance(module, nn.Linear)} - {"Linear"})
    if layers is None:
        raise ModelError(
            f"the config of {type(model).__name__} has no num_hidden_layers, so its decoder blocks cannot be told",
            hint="this architecture cannot be quantized yet",
        )
    raise ModelError(
        f"found no list of {layers} decoder blocks with linear layers in the text model of {type(model).__name__}"
        + (f"; its linear layers are {', '.join(others)}" if others else ""),
        hint="this architecture cannot be quantized yet",
    )


def _ancestors(name: str) -> Iterator[str]:
    """The names of the modules around the one called `name`, innermost first; the model itself is ""."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def discover(model: PreTrainedModel, skip: Sequence[str] = ()) -> Discovery:
    """Find the linears to quantize in `model` (parameters may be on meta).

    Args:
        skip: patterns of layer names to leave out: shell-style globs, or `re:` and a regular
            expression that must match the whole name. What is left out anyway may be among them.

    Raises:
        ModelError: no decoder blocks, or nothing left to quantize.
        UsageError: a skip pattern that matches no linear layer, or experts.
    """
    blocks = find_blocks(model)
    names = tuple(f"{blocks}.{name}" for name, _ in model.get_submodule(blocks).named_children())
    shared = {name for group in _tied(model) for name in group}
    patterns = _Skips(skip)
    linears: list[LinearInfo] = []
    kept: dict[str, str] = {}  # parameter -> why it stays as it is
    for index, block in enumerate(names):
        for info, reason in _candidates(model, block, index, kept):
            if reason is None and f"{info.name}.weight" in shared:
                reason = "shared by several layers"
            hit = patterns.first(info.name)
            if reason is None and hit is not None:
                reason = f"skipped by --skip {hit}"
            if reason is None:
                linears.append(info)
            else:
                kept[f"{info.name}.weight"] = reason
    for name in kept:
        patterns.first(name.rpartition(".")[0])
    if patterns.unmatched:
        raise UsageError(
            "no linear layer matches --skip " + ", ".join(sorted(patterns.unmatched)),
            hint="`bitstrata quantize MODEL -o OUT --dry-run` lists the layers",
        )
    check_all_experts(model, {f"{linear.name}.weight" for linear in linears}, kept)
    if not linears:
        raise ModelError("nothing is left to quantize", hint="check the --skip patterns")
    quantized = {linear.name for linear in linears}
    return Discovery(names, tuple(linears), tuple(_left_out(model, quantized, kept)), tuple(_tied(model)))


class _Skips:
    """The patterns of --skip; `unmatched` are those that no name has matched yet."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self.patterns, self.unmatched = patterns, set(patterns)

    def first(self, name: str) -> str | None:
        """The first pattern that matches `name`."""
        hits = [pattern for pattern in self.patterns if _matches(pattern, name)]
        self.unmatched.difference_update(hits)
        return hits[0] if hits else None


def _candidates(
    model: PreTrainedModel, block: str, index: int, kept: dict[str, str]
) -> Iterator[tuple[LinearInfo, str | None]]:
    """The linears of a block, each with the reason why it is not quantized, if there is one.

    What is no linear and needs a reason gets it in `kept`.
    """
    root = model.get_submodule(block)
    for name, module in root.named_modules():
        full = f"{block}.{name}" if name else block
        found = _linears_of(full, module, index)
        for info in found:
            yield info, place_reason(root, name) or size_reason(info, head_width(root, name))
        for key, _ in () if found else module.named_parameters(recurse=False):
            reason = parameter_reason(root, f"{name}.{key}" if name else key, module)
            if reason is not None:
                kept[f"{full}.{key}"] = reason


def _linears_of(name: str, module: nn.Module, block: int) -> tuple[LinearInfo, ...]:
    """The linears that `module`, called `name`, is: one, or those of its experts; none for anything else."""
    if is_experts(module):
        raise ModelError(
            f"{name} is a mixture of experts, merged into tensors of three dimensions",
            hint="such models cannot be quantized yet",
        )
    info = linear_info(name, module, block)
    if info is None:
        return ()
    if not info.in_features or not info.out_features:
        raise ModelError(
            f"config.json describes no model: {name} would be [{info.out_features}, {info.in_features}]",
            hint="download it again",
        )
    return (info,)


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatchcase(name, pattern)


def _left_out(model: PreTrainedModel, quantized: set[str], kept: dict[str, str]) -> Iterator[LeftOut]:
    head = model.get_output_embeddings()
    copies = {name: group[0] for group in _tied(model) for name in group[1:]}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}"
            if name in quantized or (parameter.dim() < 2 and full not in kept):
                continue
            if full in kept:
                reason = kept[full]
            elif full in copies:
                reason = f"output head, tied to {copies[full]}" if module is head else "tied"
            elif module is head:
                reason = "output head"
            elif isinstance(module, nn.Embedding):
                reason = "embedding"
            else:
                reason = "outside the decoder blocks"
            yield LeftOut(full, tuple(parameter.shape), reason)


def _tied(model: PreTrainedModel) -> Iterator[tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return (tuple(group) for group in names.values() if len(group) > 1)


def submodule(model: nn.Module, name: str) -> Any:
    """The submodule called `name`. Raises CheckpointError if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"the checkpoint quantizes {name}, which {type(model).__name__} lacks") from None


def local_name(model: PreTrainedModel, name: str) -> str:
    """What the layer that a checkpoint calls `name` is called in `model`.

    As transformers has it for tensors: an encoder alone lacks the prefix that it has inside a model with a head, and
    the other way round; the text model of a wrapper alone lacks that of its place there. A name that is not there
    in any way stays as it is.
    """
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if _has(model, candidate):
            return candidate
    parent, _, leaf = name.rpartition(".")
    if parent.endswith("experts"):  # a projection of experts is no module before planes are in its place
        return f"{local_name(model, parent)}.{leaf}"
    renamed = name_changes(model)(f"{name}.weight")[0].removesuffix(".weight")
    return renamed if _has(model, renamed) else name


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def linear_of(model: nn.Module, name: str, layer: LayerSpec) -> Any:
    """The linear called `name`. Raises CheckpointError unless it has the sizes of `layer`."""
    module = submodule(model, name)
    info = linear_info(name, module, 0)
    expected = (layer.in_features, layer.out_features, layer.bias)
    if info is None or (info.in_features, info.out_features, info.bias) != expected:
        bias = "a" if layer.bias else "no"
        raise CheckpointError(
            f"{name}: the checkpoint has [{layer.out_features}, {layer.in_features}] and {bias} bias, "
            f"the model has {module}"
        )
    return module


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the inputs of `model` go: its own device; the CPU if its weights lie elsewhere and come when they run."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def bytes_per_token(model: PreTrainedModel, bits: BitsOrPlan | None) -> int:
    """Bytes of weights that one decoding step reads; of the input embedding only a row, which is left out.

    Of experts it reads the active ones; where they differ in bytes, as on average.

    bits may be None for a model that is not quantized.
    """
    total = 0
    embedding = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, (PlaneLinear, TiedHead)):
            assert bits is not None
            total += round(module.share * module.bytes_read(bits))
        elif module is not embedding:  # a tied head is a module of its own
            total += sum(parameter.nbytes for parameter in module._parameters.values() if parameter is not None)
    return total
