"""A source model on disk: its config, a skeleton without weights, and its tensors, read when needed.

Nothing here loads the whole model. Only safetensors files are read.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..checkpoint import is_checkpoint
from ..checkpoint.schema import SAFETENSORS_DTYPES
from ..errors import ModelError, UsageError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
READ_BYTES = 1 << 26


def resolve(model: str | Path, *, kind: str = "model") -> Path:
    """A local folder for `model`: itself, or the snapshot of a hub id, downloaded if need be.

    Raises ModelError if it is neither, UsageError for something that is no name at all.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise UsageError(
            f"a {type(model).__name__} is not the folder or hub id of a {kind}", hint="give its path or id as a string"
        )
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):
        if any("\ud800" <= character <= "\udfff" for character in str(path)):
            raise ModelError(f"the name of {path} is not UTF-8, as the readers of its files need it", hint="rename it")
        return path
    if os.path.islink(path) and not os.path.exists(path):
        raise ModelError(f"{path} is a link to {os.readlink(path)}, which is not there", hint="check the link")
    if os.path.exists(path):
        raise ModelError(f"{path} is a file, not a {kind} folder", hint=f"pass the folder that holds the {kind}")
    text = str(model)
    head, _, tail = text.rpartition(":")
    if head and tail.isdigit():  # not a hub id: those have no colon
        raise ModelError(f"there is no {kind} folder {text!r}", hint=f"bits do not belong here: give {head}")
    if text.count("/") > 1 or text.startswith((".", "/", "~")) or text.endswith("/") or not text:
        raise ModelError(f"there is no {kind} folder {text!r}", hint="check the path")
    try:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                text, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*"]
            )
        )
    except Exception as error:
        raise ModelError(
            f"{text!r} is not a local folder, and the hub did not give it: {first_line(error)}",
            hint="check the path or the hub id; HF_TOKEN is needed for gated models",
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class SourceModel:
    """A causal language model folder with safetensors weights.

    Raises ModelError at construction for anything that keeps the weights from being read: no
    config, an unknown architecture, no safetensors, a missing or truncated shard.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if is_checkpoint(folder):
            raise ModelError(f"{folder} is already quantized by bitstrata", hint="quantize the original model instead")
        self.config = self._read_config()
        self.files = self._read_files()
        self._stored: dict[str, str] = {}

    def _read_config(self) -> PreTrainedConfig:
        if not (self.folder / "config.json").is_file():
            raise ModelError(
                f"{self.folder} has no config.json", hint="pass the folder of a Hugging Face causal language model"
            )
        try:
            config = AutoConfig.from_pretrained(str(self.folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise ModelError(
                f"{self.folder / 'config.json'} cannot be used: {first_line(error)}",
                hint="is this the folder of a causal language model that this version of transformers knows?",
            ) from error
        known = type(config) in AutoModelForCausalLM._model_mapping  # not .keys(): that imports every architecture
        if not known:
            raise ModelError(
                f"{self.folder}: {config.model_type!r} is not a causal language model of transformers",
                hint="bitstrata quantizes decoder-only causal language models",
            )
        if getattr(config, "quantization_config", None):
            raise ModelError(f"{self.folder} is already quantized", hint="quantize the original model instead")
        return config

    def _read_files(self) -> dict[str, str]:
        """Tensor name -> file name."""
        if (self.folder / INDEX).is_file():
            try:
                files = dict(json.loads((self.folder / INDEX).read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError(
                    f"{self.folder / INDEX} is not a valid index: {error}", hint="download the model again"
                ) from error
        elif (self.folder / SINGLE).is_file():
            files = dict.fromkeys(self._keys(SINGLE), SINGLE)
        else:
            found = sorted(path.name for path in self.folder.glob("*.bin"))
            hint = (
                "convert the .bin files first: load with transformers and save_pretrained"
                if found
                else "is the download complete?"
            )
            raise ModelError(f"{self.folder} has no {SINGLE} and no {INDEX}", hint=hint)
        for file in files.values():
            if not isinstance(file, str) or Path(file).name != file:
                raise ModelError(f"{self.folder / INDEX}: {file!r} is not a file name", hint="download the model again")
        for file in sorted(set(files.values())):
            missing = {name for name, home in files.items() if home == file} - self._keys(file)
            if missing:
                raise ModelError(
                    f"{self.folder / file} lacks {sorted(missing)[0]} that the index promises",
                    hint="download the model again",
                )
        return files

    def _open(self, file: str) -> safe_open:
        try:
            return safe_open(str(self.folder / file), framework="pt")
        except FileNotFoundError:
            raise ModelError(f"shard {file} is missing from {self.folder}", hint="download the model again") from None
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{self.folder / file} is not a whole safetensors file: {error}", hint="download it again"
            ) from error

    def _keys(self, file: str) -> set[str]:
        return set(self._open(file).keys())

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype the model is stored in: the config's, else that of its first floating tensor."""
        declared = getattr(self.config, "dtype", None)
        if isinstance(declared, torch.dtype):
            return declared
        return next((self.spec(name)[0] for name in self.files if self.spec(name)[0].is_floating_point), torch.float32)

    def digests(self) -> dict[str, str]:
        """sha256 of the config and of every weight file, for provenance and for resuming safely."""
        result = {}
        for file in ["config.json", *sorted(set(self.files.values()))]:
            with open(self.folder / file, "rb") as handle:
                result[file] = hashlib.file_digest(handle, "sha256").hexdigest()
        return result

    def skeleton(self) -> PreTrainedModel:
        """The model with every parameter on meta; buffers such as rotary frequencies are real, fp32."""
        with init_empty_weights(include_buffers=False):
            # a copy, because transformers writes the dtype into the config it is given
            config = copy.deepcopy(self.config)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.tie_weights()
        self._stored = self._bind(model)
        return model.eval().requires_grad_(False)

    def stored_name(self, name: str) -> str | None:
        """The stored name of state-dict entry `name`; None if it is not stored. Needs `skeleton` first."""
        return self._stored.get(name)

    def _bind(self, model: PreTrainedModel) -> dict[str, str]:
        """State-dict name -> stored name.

        Names may differ by the base model's prefix and by the renamings that transformers applies to
        older files. Raises ModelError for tensors that transformers would merge or split.
        """
        expected = set(model.state_dict())
        prefix = f"{model.base_model_prefix}."
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        names: dict[str, str] = {}
        for stored in sorted(self.files):
            renamed = stored
            for renaming in renamings:
                renamed, _ = renaming.rename_source_key(renamed)
            if any(converter.rename_source_key(renamed)[1] is not None for converter in converters):
                raise ModelError(
                    f"{stored} is stored in pieces that transformers merges when it loads them (mixture of experts)",
                    hint="such models cannot be quantized yet",
                )
            for candidate in (renamed, prefix + renamed, renamed.removeprefix(prefix)):
                if candidate in expected:
                    names[candidate] = stored
                    break
        return names

    def spec(self, stored: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """(dtype, shape) of a stored tensor, from the header."""
        part = self._open(self.files[stored]).get_slice(stored)
        dtype = part.get_dtype()
        if dtype not in SAFETENSORS_DTYPES:
            raise ModelError(
                f"{stored} is stored as {dtype}, which cannot be quantized", hint="use a model in bf16, fp16 or fp32"
            )
        return SAFETENSORS_DTYPES[dtype], tuple(part.get_shape())

    def map(self, stored: str) -> Tensor:
        """A stored tensor, memory-mapped: for reading once, not for keeping."""
        tensor: Tensor = self._open(self.files[stored]).get_tensor(stored)
        return tensor

    def rows(self, stored: str, start: int, stop: int) -> Tensor:
        """Rows start..stop-1 of a stored tensor, copied out of the file."""
        with self._open(self.files[stored]) as file:
            part: Tensor = file.get_slice(stored)[start:stop]
            return part.clone()

    def read(self, stored: str) -> Tensor:
        """A stored tensor, copied out of the file so that nothing stays mapped."""
        dtype, shape = self.spec(stored)
        if not shape:
            return self.map(stored).clone()
        result = torch.empty(shape, dtype=dtype, device="cpu")
        step = max(1, READ_BYTES // max(1, result[:1].nbytes))
        for start in range(0, shape[0], step):
            # opened anew for each stretch, so that only one stretch of the file is resident at a time
            with self._open(self.files[stored]) as file:
                result[start : start + step] = file.get_slice(stored)[start : start + step]
        return result

    def materialise(self, module: nn.Module, prefix: str, skip: Iterable[str] = ()) -> None:
        """Fill the meta parameters and persistent buffers of `module`, at `prefix` in the skeleton, in fp32.

        Raises ModelError naming a tensor that is not stored, has another shape, or is not finite.
        """
        skipped = set(skip)
        persistent = set(module.state_dict(keep_vars=True))
        for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
            full = f"{prefix}.{key}" if prefix else key
            if key not in persistent or full in skipped:
                continue
            stored = self.stored_name(full)
            if stored is None:
                raise ModelError(f"{self.folder} stores no tensor for {full}")
            value = self.read(stored)
            if value.shape != tensor.shape:
                raise ModelError(
                    f"{stored}: the config asks for shape {list(tensor.shape)}, the file has {list(value.shape)}"
                )
            if value.is_floating_point():
                if not all_finite(value):
                    raise ModelError(f"{stored} holds NaN or infinity", hint="the source model is damaged")
                value = value.float()
            parent, _, leaf = key.rpartition(".")
            owner = module.get_submodule(parent)
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                owner._buffers[leaf] = value


def context_limit(config: PreTrainedConfig) -> int | None:
    """The longest sequence, in tokens, that a model of this config was made for; None if it does not say."""
    limit: int | None = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit


def all_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds neither NaN nor infinity; makes no temporary of its size."""
    return tensor.numel() == 0 or all(bool(bound.isfinite()) for bound in tensor.aminmax())


def release(module: nn.Module) -> None:
    """Send parameters back to meta, so that their memory is free again; tied ones stay tied."""
    empty: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None and not parameter.is_meta:
                if id(parameter) not in empty:
                    empty[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=False)
                owner._parameters[key] = empty[id(parameter)]
