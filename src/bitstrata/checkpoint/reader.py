"""Read checkpoints lazily: headers first, then only the planes and scales that are asked for.

Names, dtypes and shapes are compared with `config.json` before a single weight is read, so a
malformed file is a CheckpointError that names the tensor and the file.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, InputError, UnsupportedBitsError
from ..planes.weights import MAX_BITS, PlaneWeight, is_byte_unit, make_scales
from ..progress import note
from .config_digest import changed_fields
from .schema import (
    CONFIG_FILE,
    INDEX_FILE,
    SAFETENSORS_DTYPES,
    SINGLE_FILE,
    UNIT,
    QuantizationSpec,
    TensorSpec,
    guard_name,
    is_plane,
)

MAX_DEPTH = 100  # of JSON: real configs have six levels, and whoever walks one by recursion can take this many
ACCEPT_CONFIG = f"if it was changed on purpose, delete metadata.config_sha256 from {INDEX_FILE}"
_MIXED = f"{CONFIG_FILE} and the weights are of different models; copy or download them again"
_SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")


def regular_file(path: Path, error: type[InputError] = CheckpointError) -> Path:
    """`path`, unless it is a pipe, a socket or a device, which would be waited for or read without end: then `error`.

    Whoever opens it says what else is wrong with it.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return path
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise error(f"{path} is not a file but a pipe, socket or device", hint="put the file itself in its place")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`; CheckpointError if it is missing, not JSON, not an object, or nested too deep."""
    try:
        value = json.loads(regular_file(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", hint="is this the right folder?") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, absurdly long numbers or deep nesting
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found a {type(value).__name__}")
    if is_deeper(value, MAX_DEPTH):
        raise CheckpointError(f"{path} is not valid JSON for a model: it is nested more than {MAX_DEPTH} levels deep")
    return value


def is_deeper(value: object, limit: int) -> bool:
    """Whether dicts and lists are nested more than `limit` deep."""
    level = [value]
    for _ in range(limit):
        inside = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list)))
        level = [item for items in inside for item in items]
    return any(isinstance(one, (dict, list)) for one in level)


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` has a config.json that claims to be ours; nothing else is checked."""
    try:
        spec = read_json(folder / CONFIG_FILE).get("quantization_config")
    except CheckpointError:
        return False
    return isinstance(spec, dict) and spec.get("quant_method") == "bitstrata"


def _digests_of(metadata: object, key: str, what: str, path: Path) -> dict[str, str]:
    """The digests under `key` of an index's metadata; none where it is not there."""
    digests = metadata.get(key, {}) if isinstance(metadata, Mapping) else None
    if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
        raise CheckpointError(f"{path}: metadata.{key} must map {what} to digests")
    return digests


class Shard:
    """One safetensors file, opened for its header; tensors are mapped when read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        regular_file(path)
        try:
            self._file = safe_open(str(path), framework="pt")
            self.names: frozenset[str] = frozenset(self._file.keys())
        except FileNotFoundError:
            raise CheckpointError(
                f"shard {path.name} is missing from {path.parent}",
                hint="copy or download it again, or load with a lower max_bits",
            ) from None
        except (SafetensorError, OSError, UnicodeError) as error:
            raise CheckpointError(
                f"{path} is not a whole safetensors file: {error}", hint="copy or download it again"
            ) from error

    def spec(self, name: str) -> TensorSpec:
        """(dtype, shape) of tensor `name` from the header."""
        self._require(name)
        part = self._file.get_slice(name)
        return part.get_dtype(), tuple(part.get_shape())

    def read(self, name: str, part: int | None = None) -> Tensor:
        """Tensor `name`, or the part of it that has this index in its first dimension, memory-mapped."""
        self._require(name)
        try:
            tensor: Tensor = self._file.get_tensor(name) if part is None else self._file.get_slice(name)[part]
        except SafetensorError as error:
            raise CheckpointError(f"{name} in {self.path} cannot be read: {error}") from error
        return tensor

    def _require(self, name: str) -> None:
        if name not in self.names:
            raise CheckpointError(f"tensor {name} is missing from {self.path}")


def check_spec(tensor: str, file: str, found: TensorSpec, expected: TensorSpec) -> None:
    """CheckpointError unless a tensor's dtype and shape are the expected ones."""
    if found != expected:
        raise CheckpointError(
            f"{tensor} in {file}: expected {expected[0]} {list(expected[1])}, found {found[0]} {list(found[1])}"
        )


def check_values(tensor: str, file: str, value: Tensor) -> None:
    """CheckpointError unless a tensor of planes or scales has values that a reader can use."""
    if value.dtype == torch.float16 and not all(bool(bound.isfinite()) for bound in value.aminmax()):
        raise CheckpointError(f"{tensor} in {file} holds NaN or infinity", hint="the file is damaged")
    if UNIT.search(tensor) and not bool(is_byte_unit(value).all()):
        raise CheckpointError(
            f"{tensor} in {file} holds a unit with more than four significant bits, below 2^-14 or negative",
            hint="the file is damaged",
        )


class CheckpointReader:
    """A checkpoint folder, opened lazily.

    Args:
        folder: the checkpoint.
        max_bits: only planes 0..max_bits-1 and scales up to it are looked at; files that hold
            nothing else need not exist. Layers with a role are read whole.
        verify: compare the sha256 of every file that is opened, and of every field of config.json, with those in the
            index. Without it `quantization_config` alone is compared, and `changed_config` names the others.
        paged: look only at what every plan of the model needs; planes and scales of the planned layers are somebody
            else's concern (PageReader).
        checked: compare the headers with config.json at once; if not, `layer_problems` and `other_problems` do it.

    Raises:
        CheckpointError: anything missing or malformed, named.
        UnsupportedBitsError: no supported bits are at or below `max_bits`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_bits: int | None = None,
        verify: bool = False,
        paged: bool = False,
        checked: bool = True,
    ) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder", hint="pass the OUT folder of `bitstrata quantize`")
        self.config = read_json(self.folder / CONFIG_FILE)
        self.spec = QuantizationSpec.parse(self.config.get("quantization_config"), str(self.folder))
        self.max_bits = max_bits if max_bits is not None else MAX_BITS
        self.bits = tuple(bits for bits in self.spec.bits if bits <= self.max_bits)
        if not self.bits:
            raise UnsupportedBitsError(f"<= {max_bits}", self.spec.bits, where=str(self.folder))
        self._verify, self.paged = verify, paged
        self._shards: dict[str, Shard | CheckpointError] = {}
        self._digests: dict[str, str] = {}
        self._config_digests: dict[str, str] = {}
        self.weight_map = self._read_weight_map()
        self.changed_config = changed_fields(self.config, self._config_digests) if self._config_digests else ()
        if checked:
            for layer in self.spec.layers:
                for problem in self.layer_problems(layer):
                    raise problem
            for problem in self.other_problems():
                raise problem

    def _read_weight_map(self) -> dict[str, str]:
        # transformers takes the single file where there are both, and the index is then of files written earlier
        if (self.folder / SINGLE_FILE).exists() or not (self.folder / INDEX_FILE).exists():
            return dict.fromkeys(self.shard(SINGLE_FILE).names, SINGLE_FILE)
        path = self.folder / INDEX_FILE
        index = read_json(path)
        weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{path}: weight_map must map tensor names to file names")
        for file in weight_map.values():
            if not _SHARD_NAME.fullmatch(file):
                raise CheckpointError(f"{path}: {file!r} is not a plain safetensors file name")
        self._digests = _digests_of(metadata, "sha256", "file names", path)
        self._config_digests = _digests_of(metadata, "config_sha256", "fields of config.json", path)
        return weight_map

    def layer_problems(self, layer: str) -> Iterator[CheckpointError]:
        """What is wrong with the tensors of `layer` as their files' headers describe them; no weight is read."""
        spec = self.spec.layers[layer]
        bias = f"{layer}.bias"
        if spec.bias:
            lead = () if spec.experts is None else (spec.experts,)
            yield from self._header_problems(bias, (*lead, spec.out_features))
        elif bias in self.weight_map:
            yield CheckpointError(f"{bias} is stored, but {CONFIG_FILE} says that the layer has no bias", hint=_MIXED)
        if guard_name(layer) in self.weight_map:
            yield from self._header_problems(guard_name(layer), (0,))
        for name, expected in self._layer_tensors(layer).items():
            try:
                check_spec(name, self.weight_map.get(name, ""), self._shard_with(name).spec(name), expected)
            except CheckpointError as error:
                yield error

    def other_problems(self) -> Iterator[CheckpointError]:
        """What is wrong with the tensors of no layer, and with config.json."""
        own = {name for layer in self.spec.layers for name in (guard_name(layer), f"{layer}.bias")}
        for name in sorted(self.common_names() - own):
            layer = name.rpartition(".")[0]
            if layer in self.spec.layers or is_plane(name):
                yield CheckpointError(
                    f"{name} is stored, but {CONFIG_FILE} describes no layer that has it", hint=_MIXED
                )
            else:
                yield from self._header_problems(name, None)
        if self.changed_config and (self._verify or "quantization_config" in self.changed_config):
            yield CheckpointError(
                f"{self._changes()}; {ACCEPT_CONFIG}", hint="copy or download it again, unless the change is wanted"
            )

    def note_changes(self) -> None:
        """Say so if config.json was changed since the checkpoint was written."""
        if self.changed_config:
            note(f"{self._changes()}, and is used as it is now; {ACCEPT_CONFIG}")

    def _changes(self) -> str:
        return f"{self.folder / CONFIG_FILE} is not as it was written (changed: {', '.join(self.changed_config)})"

    def _header_problems(self, name: str, shape: tuple[int, ...] | None) -> Iterator[CheckpointError]:
        """Problems of an unquantized tensor, which has a dtype that we know, and this shape if one is given.

        A bias or a guard stands for the weight of a linear layer, so its numbers have a fraction.
        """
        try:
            dtype, found = self._shard_with(name).spec(name)
        except CheckpointError as error:
            yield error
            return
        if shape is not None and found != shape:
            yield CheckpointError(
                f"{name} in {self.weight_map[name]}: expected shape {list(shape)}, found {list(found)}", hint=_MIXED
            )
        known = SAFETENSORS_DTYPES.get(dtype)
        if known is None or (shape is not None and not known.is_floating_point):
            kind = "a floating-point dtype" if shape is not None else f"one of {', '.join(SAFETENSORS_DTYPES)}"
            yield CheckpointError(f"{name} in {self.weight_map[name]}: expected {kind}, found {dtype}", hint=_MIXED)

    def _layer_tensors(self, layer: str) -> dict[str, TensorSpec]:
        """The tensors of `layer` that this reader looks at."""
        if self.paged and self.spec.layers[layer].role is None:
            return {}
        return self.spec.layer_tensors(layer, self.max_bits)

    def shard(self, file: str) -> Shard:
        """The shard `file`, opened and (with `verify`) compared with its digest, once."""
        if file not in self._shards:
            try:
                shard = Shard(self.folder / file)
                if self._verify:
                    self.check_digest(file)
                self._shards[file] = shard
            except CheckpointError as error:
                self._shards[file] = error
        found = self._shards[file]
        if isinstance(found, CheckpointError):
            raise found
        return found

    def check_digest(self, file: str) -> None:
        """Raise CheckpointError unless `file` has the digest that the index has of it; reads all of it."""
        if not self._digests:
            return
        try:
            with open(self.folder / file, "rb") as handle:
                found = hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{self.folder / file} cannot be read: {error.strerror}") from error
        if found != self._digests.get(file):
            raise CheckpointError(
                f"{self.folder / file} is damaged: its sha256 is not the one in {INDEX_FILE}",
                hint="copy or download it again",
            )

    def _shard_with(self, tensor: str) -> Shard:
        file = self.weight_map.get(tensor)
        if file is None:
            raise CheckpointError(f"tensor {tensor} is not listed in {self.folder / INDEX_FILE}")
        return self.shard(file)

    def read(self, tensor: str, part: int | None = None) -> Tensor:
        """One tensor, or one expert's part of it, memory-mapped; scales, offsets and tables are checked."""
        value = self._shard_with(tensor).read(tensor, part)
        if tensor not in self.common_names():
            check_values(tensor, self.weight_map[tensor], value)
        return value

    def layer(self, name: str) -> PlaneWeight:
        """The planes and scales of the linear `name`, up to `max_bits`; of experts, of one."""
        home, expert = self.spec.linears.get(name, (None, None))
        if home is None:
            raise CheckpointError(f"{self.folder} has no quantized layer {name}")
        layer = self.spec.layers[home]
        tensors = {
            full.removeprefix(f"{home}."): self.read(full, expert)
            for full in self.spec.layer_tensors(home, self.max_bits)
        }
        supported = self.spec.layer_bits(name, self.max_bits)
        return PlaneWeight(
            planes=tuple(tensors[f"plane_{index}"] for index in range(max(supported))),
            scales={bits: make_scales(layer.decoder, bits, tensors) for bits in supported},
            in_features=layer.in_features,
            group_size=self.spec.layer_group_size(name),
        )

    def common_names(self) -> frozenset[str]:
        """Names of the tensors that are not quantized, the guards of quantized layers included."""
        if not hasattr(self, "_common"):
            quantized = {name for layer in self.spec.layers for name in self.spec.layer_tensors(layer)}
            self._common = frozenset(self.weight_map) - quantized
        return self._common

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor a model at up to `max_bits` needs, memory-mapped, under its module's name.

        With `paged` the tensors of planned layers are left out.
        """
        return dict(self._state_items())

    def _state_items(self) -> Iterator[tuple[str, Tensor]]:
        for name in sorted(self.common_names()):
            yield name, self.read(name)
        for layer in self.spec.layers:
            for name in self._layer_tensors(layer):
                yield name, self.read(name)

    @property
    def has_digests(self) -> bool:
        """Whether the index carries digests; `save_pretrained` writes none."""
        return bool(self._digests)

    @property
    def covers_config(self) -> bool:
        """Whether the index carries digests of config.json; older checkpoints have none."""
        return bool(self._config_digests)

    @property
    def digests(self) -> dict[str, str]:
        """File name -> sha256 as the index has them; empty if it has none."""
        return dict(self._digests)

    def tensor_spec(self, tensor: str) -> TensorSpec:
        """(dtype, shape) of a stored tensor from its file's header."""
        return self._shard_with(tensor).spec(tensor)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that the model was quantized in, from its guards; None if it has none."""
        for layer in self.spec.layers:
            if guard_name(layer) in self.weight_map:
                return SAFETENSORS_DTYPES.get(self.tensor_spec(guard_name(layer))[0])
        return None

    def missing_guards(self) -> list[str]:
        """Quantized layers without the placeholder that makes foreign loaders fail loudly."""
        return [layer for layer in self.spec.layers if guard_name(layer) not in self.weight_map]
