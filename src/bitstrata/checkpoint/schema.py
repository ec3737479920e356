"""What `config.json` says about a checkpoint, and which tensor lives in which file.

`QuantizationSpec` is the `quantization_config` of `config.json`. It is read strictly: an unknown
field, a missing one or a value of the wrong type is an error that names it, and a
`format_version` above ours is refused before anything else is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from functools import cached_property
from math import prod
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import CheckpointError
from ..planes.pack import words_per_row
from ..planes.weights import MAX_BITS, Kind, scales_bytes, scales_shapes

QUANT_METHOD = "bitstrata"
FORMAT_VERSION = 4  # the highest that is read; what needs no higher one is still written as 1
HEAD_VERSION = 2  # the first with an output head or an embedding in planes
BYTE_VERSION = 3  # the first with coefficients in bytes
EXPERTS_VERSION = 4  # the first with layers of several experts
MOST_EXPERTS = 1 << 14  # of a layer; each has a name in plans

COMMON_SHARD = "model-common.safetensors"
HEAD_SHARD = "model-head.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
REPORT_FILE = "bitstrata_report.json"

_PLANE = re.compile(r"\.plane_(\d+)$")
UNIT = re.compile(r"\.unit_\d+$")
_SCALES = re.compile(r"\.(?:scale|offset|unit|table)_(\d+)$")

# (safetensors dtype, shape) of a tensor
TensorSpec = tuple[str, tuple[int, ...]]

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

_Size = Annotated[int, Field(ge=1, le=2**31 - 1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class LayerSpec(Strict):
    """One quantized layer. `bits` and `group_size` are given only where they differ from the model's.

    A layer may have more bits than the model, never fewer: the model runs uniformly at each of its own.
    One with a `role` has exactly one bits value of its own and keeps it whatever the model runs at:

        head        the output head
        embedding   the token embedding; its rows are looked up. `tied` names the output head that
                    multiplies by the same planes, if there is one

    One with `experts` is as many linears of one shape, of each of which a plan gives the bits: `a.experts.up_proj` is
    a.experts.0.up_proj, a.experts.1.up_proj and so on. Their tensors are stored as one, experts first.
    `active`: how many of them a token reads, where that is known.
    """

    in_features: _Size
    out_features: _Size
    decoder: Kind = "affine"
    bias: bool = False
    bits: list[int] | None = None
    group_size: _Size | None = None
    role: Literal["head", "embedding"] | None = None
    tied: str | None = None
    experts: _Size | None = None
    active: _Size | None = None

    @property
    def is_multiplied(self) -> bool:
        """Whether a token reads the whole layer; of an embedding that serves no head it reads one row."""
        return self.role != "embedding" or self.tied is not None

    @property
    def read_at_once(self) -> int:
        """How many of its linears a token reads."""
        return self.active or self.experts or 1


class QuantizationSpec(Strict):
    """`quantization_config` of a bitstrata checkpoint (FORMAT.md)."""

    quant_method: Literal["bitstrata"] = "bitstrata"
    format_version: int = 1
    method: str
    method_options: dict[str, Any] = Field(default_factory=dict)
    bits: list[int]
    group_size: _Size
    scale_dtype: Literal["float16"] = "float16"
    layers: dict[str, LayerSpec]
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _bits_are_valid(self) -> QuantizationSpec:
        exceptions = [(name, layer.bits) for name, layer in self.layers.items() if layer.bits is not None]
        for where, bits in [("bits", self.bits), *exceptions]:
            if not bits or bits != sorted(set(bits)) or not (bits[0] >= 1 and bits[-1] <= MAX_BITS):
                raise ValueError(f"{where}: bits must be ascending, distinct and within 1..{MAX_BITS}, got {bits}")
            if where in self.layers and self.layers[where].role is not None:
                continue
            if not set(self.bits) <= set(bits):
                raise ValueError(f"{where}: bits {bits} lack some of the model's bits {self.bits}")
        return self

    @model_validator(mode="after")
    def _something_is_planned(self) -> QuantizationSpec:
        if not self.planned_layers:
            raise ValueError("layers must name at least one layer without a role")
        return self

    @model_validator(mode="after")
    def _roles_are_valid(self) -> QuantizationSpec:
        for name, layer in self.layers.items():
            if layer.tied is not None and layer.role != "embedding":
                raise ValueError(f"{name}: only an embedding can be tied to an output head")
            if layer.role is None:
                continue
            if self.format_version < HEAD_VERSION:
                raise ValueError(f"{name}: role {layer.role!r} needs format_version {HEAD_VERSION}")
            if layer.bits is None or len(layer.bits) != 1:
                raise ValueError(f"{name}: role {layer.role!r} needs exactly one bits value, got {layer.bits}")
            if layer.role == "embedding" and layer.bias:
                raise ValueError(f"{name}: an embedding has no bias")
            if layer.tied in self.layers:
                raise ValueError(f"{name}: {layer.tied} reads its planes and must not have planes of its own")
        return self

    @model_validator(mode="after")
    def _scales_are_of_the_version(self) -> QuantizationSpec:
        for name, layer in self.layers.items():
            if layer.decoder == "affine8" and self.format_version < BYTE_VERSION:
                raise ValueError(f"{name}: scales 'affine8' needs format_version {BYTE_VERSION}")
        return self

    @model_validator(mode="after")
    def _experts_are_valid(self) -> QuantizationSpec:
        for name, layer in self.layers.items():
            if layer.experts is None:
                if layer.active is not None:
                    raise ValueError(f"{name}: only experts can be active")
                continue
            if self.format_version < EXPERTS_VERSION:
                raise ValueError(f"{name}: experts need format_version {EXPERTS_VERSION}")
            if layer.role is not None:
                raise ValueError(f"{name}: experts have no role")
            if layer.active is not None and layer.active > layer.experts:
                raise ValueError(f"{name}: {layer.active} of {layer.experts} experts cannot be active")
            if layer.experts > MOST_EXPERTS:
                raise ValueError(f"{name}: {layer.experts} experts are more than {MOST_EXPERTS}")
        if len(self.linears) < sum(layer.experts or 1 for layer in self.layers.values()):
            raise ValueError("layers: an expert has the name of another layer")
        return self

    @classmethod
    def parse(cls, raw: object, where: str) -> QuantizationSpec:
        """Read the spec from a decoded `quantization_config`. Raises CheckpointError naming the field."""
        if not isinstance(raw, Mapping) or raw.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(
                f"{where} is not a bitstrata checkpoint (no quantization_config with quant_method {QUANT_METHOD!r})",
                hint="make one with `bitstrata quantize MODEL -o OUT`",
            )
        version = raw.get("format_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise CheckpointError(f"{where}: format_version must be a positive integer, got {version!r}")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{where} has format_version {version}; this bitstrata reads up to {FORMAT_VERSION}",
                hint="upgrade bitstrata: pip install -U bitstrata",
            )
        try:
            return cls.model_validate(dict(raw))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "quantization_config"
            raise CheckpointError(f"{where}: quantization_config.{field}: {first['msg']}") from error

    @cached_property
    def linears(self) -> dict[str, tuple[str, int | None]]:
        """Every linear by its own name, in the order of the file -> the layer that holds it, and which expert it is."""
        return {
            expert_name(name, expert): (name, expert)
            for name, layer in self.layers.items()
            for expert in (range(layer.experts) if layer.experts is not None else [None])
        }

    def layer(self, name: str) -> LayerSpec:
        """What is said of a layer, or of the layer that holds this expert. Raises KeyError for any other name."""
        return self.layers[name] if name in self.layers else self.layers[self.linears[name][0]]

    def layer_bits(self, name: str, max_bits: int = MAX_BITS) -> tuple[int, ...]:
        """Supported bits of layer `name` up to `max_bits`, ascending; a layer with a role keeps its own."""
        layer = self.layer(name)
        limit = MAX_BITS if layer.role is not None else max_bits
        return tuple(bits for bits in layer.bits or self.bits if bits <= limit)

    @property
    def whole_layers(self) -> frozenset[str]:
        """The layers with a role: whoever loads the model needs all of their planes, at any of its bits."""
        return frozenset(name for name, layer in self.layers.items() if layer.role is not None)

    def layer_group_size(self, name: str) -> int:
        return self.layer(name).group_size or self.group_size

    def layer_tensors(self, name: str, max_bits: int = MAX_BITS) -> dict[str, TensorSpec]:
        """Full names, dtypes and shapes of the planes and scales up to `max_bits` of layer `name`, or of one expert.

        Those of a layer of experts, as they are stored, have experts first.
        """
        layer = self.layer(name)
        lead = (layer.experts,) if layer.experts is not None and name in self.layers else ()
        supported = self.layer_bits(name, max_bits)
        plane_shape = (*lead, layer.out_features, words_per_row(layer.in_features))
        tensors: dict[str, TensorSpec] = {
            f"{name}.plane_{index}": ("I32", plane_shape) for index in range(max(supported, default=0))
        }
        for bits in supported:
            shapes = scales_shapes(
                layer.decoder, bits, layer.out_features, layer.in_features, self.layer_group_size(name)
            )
            tensors.update(
                {f"{name}.{key}": (DTYPE_NAMES[dtype], (*lead, *shape)) for key, (dtype, shape) in shapes.items()}
            )
        return tensors

    def layer_bytes(self, name: str) -> int:
        """Bytes stored for layer `name`, or for one expert: all planes and scales."""
        return sum(map(tensor_bytes, self.layer_tensors(name).values()))

    def prefix_bytes(self, name: str, bits: int) -> int:
        """Bytes of the linear `name` at `bits`, one of its own: planes 0..bits-1 and those scales."""
        layer = self.layer(name)
        rows, columns = layer.out_features, layer.in_features
        planes = 4 * bits * rows * words_per_row(columns)
        return planes + scales_bytes(layer.decoder, bits, rows, columns, self.layer_group_size(name))

    def bytes_read(self, bits: int) -> int:
        """Bytes that one token reads of the quantized layers at `bits`: the prefix and its scales.

        Of experts the active ones count, an output head with all its planes, the one row of an embedding with nothing.
        """
        planned = ((name, layer) for name, layer in self.layers.items() if layer.role is None)
        return self.fixed_bytes_read + sum(
            layer.read_at_once * self.prefix_bytes(expert_name(name, 0 if layer.experts else None), bits)
            for name, layer in planned
        )

    @property
    def fixed_bytes_read(self) -> int:
        """What a token reads of the layers with a role, whatever bits the model runs at."""
        return sum(self.layer_bytes(name) for name in self.whole_layers if self.layers[name].is_multiplied)

    @cached_property
    def planned_layers(self) -> tuple[str, ...]:
        """The linears whose bits a plan gives, in the order of the file, each expert's apart: those without a role."""
        return tuple(name for name, (layer, _) in self.linears.items() if self.layers[layer].role is None)

    @property
    def weights_read(self) -> int:
        """Weights that `bytes_read` is about: of experts the active ones."""
        multiplied = (layer for layer in self.layers.values() if layer.is_multiplied)
        return sum(layer.read_at_once * layer.in_features * layer.out_features for layer in multiplied)

    @property
    def weight_count(self) -> int:
        """Weights of the layers that tokens are multiplied by, all experts among them."""
        multiplied = (layer for layer in self.layers.values() if layer.is_multiplied)
        return sum((layer.experts or 1) * layer.in_features * layer.out_features for layer in multiplied)


def format_version(layers: Iterable[LayerSpec]) -> int:
    """The lowest format version that can say all of this."""
    version = 1
    for layer in layers:
        if layer.role is not None:
            version = max(version, HEAD_VERSION)
        if layer.decoder == "affine8":
            version = max(version, BYTE_VERSION)
        if layer.experts is not None:
            version = max(version, EXPERTS_VERSION)
    return version


def expert_name(layer: str, expert: int | None) -> str:
    """What one expert of `layer` is called: a.experts.up_proj -> a.experts.3.up_proj. None: no experts, the layer's."""
    parent, _, leaf = layer.rpartition(".")
    return layer if expert is None else f"{parent}.{expert}.{leaf}" if parent else f"{expert}.{leaf}"


def tensor_bytes(spec: TensorSpec) -> int:
    """Bytes of a stored plane or scales tensor."""
    dtype, shape = spec
    return prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize


def guard_name(layer: str) -> str:
    """The placeholder under a quantized layer's original name.

    Its shape [0] fits no linear layer, so a loader that does not know the format fails with a
    size mismatch instead of silently keeping random weights.
    """
    return f"{layer}.weight"


def is_plane(tensor: str) -> bool:
    """Whether a tensor's full name is a plane's."""
    return _PLANE.search(tensor) is not None


def shard_of(tensor: str, whole_layers: Container[str] = ()) -> str:
    """The shard file that holds tensor `tensor` in a checkpoint written by bitstrata.

    `whole_layers` are those of the spec: they are in a file of their own, because a reader that wants
    few bits of the others needs all of these.
    """
    if tensor.rpartition(".")[0] in whole_layers and (_PLANE.search(tensor) or _SCALES.search(tensor)):
        return HEAD_SHARD
    if plane := _PLANE.search(tensor):
        return f"model-plane-{int(plane[1])}.safetensors"
    if found := _SCALES.search(tensor):
        return f"model-bits-{int(found[1])}.safetensors"
    return COMMON_SHARD
