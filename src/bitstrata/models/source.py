"""A source model on disk: its config, a skeleton without weights, and its tensors, read when needed.

`load_reference` alone loads a whole model. Only safetensors files are read.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..checkpoint import is_checkpoint
from ..checkpoint.reader import regular_file
from ..checkpoint.schema import SAFETENSORS_DTYPES
from ..errors import ModelError, first_line
from ..memory import is_out_of_memory
from ..options import FromHub
from ..planes.weights import all_finite
from .compat import new_model, tied_parameters
from .config import causal_class, check_causal
from .experts import Part, split_experts
from .hub import resolve
from .packed import BESIDE, METHODS, Converted, FewBits, Packed, Spec, find_packed
from .source_files import AGAIN, FileWatch, bind, check_adapter, entry_file, indexed_files, share

READ_BYTES = 1 << 26


class SourceModel:
    """A causal language model folder with safetensors weights.

    packed: name of a tensor that is stored in few bits, or in another form -> how (packed.py). Everything here takes
        and gives it as the tensor of numbers that the model has.
    untied: pairs (head, embedding) that the config ties though their stored tensors differ. Both are
        kept, as transformers does; `config` then ties nothing. Known after `skeleton`.

    Raises ModelError at construction for anything that keeps the weights from being read: no
    config, an architecture that is unknown or no causal language model, no safetensors, a missing
    or truncated shard.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if is_checkpoint(folder):
            raise ModelError(f"{folder} is already quantized by bitstrata", hint="quantize the original model instead")
        check_adapter(folder)
        self._watch = FileWatch(folder)
        self.settings: dict[str, Any] = {}  # the quantization_config of a model in few bits
        self.config = self._read_config()
        self.packed: dict[str, Packed] = {}
        self._raw: dict[str, str] = {}  # every tensor of the files -> its file
        self._few: dict[str, FewBits] = {}
        self._read = self.files = self._read_files()
        self.untied: list[tuple[str, str]] = []
        self._stored: dict[str, str] = {}
        self._parts: dict[str, Part] = {}  # names that `stored_name` gives to parts of tensors of all experts

    def _read_config(self) -> PreTrainedConfig:
        path = regular_file(self.folder / "config.json", ModelError)
        if not path.is_file():
            raise ModelError(
                f"{self.folder} has no config.json", hint="pass the folder of a Hugging Face causal language model"
            )
        self._watch.check("config.json")
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                str(self.folder), local_files_only=True, trust_remote_code=False
            )
            if not isinstance(config.get_text_config(decoder=True), PreTrainedConfig):
                raise ValueError("its part for text is not the config of a model")
        except Exception as error:
            raise ModelError(
                f"{path} cannot be used: {first_line(error)}",
                hint="is this the folder of a causal language model that this version of transformers knows?",
            ) from error
        check_causal(self.folder, config)
        for part in (config, *_sub_configs(config)):
            found = getattr(part, "quantization_config", None)
            if not found:
                continue
            found = found if isinstance(found, dict) else found.to_dict()
            if found.get("quant_method") not in METHODS:
                raise ModelError(
                    f"{self.folder} is already quantized ({found.get('quant_method', 'by an unnamed method')})",
                    hint="quantize the original model instead",
                )
            self.settings = found
            del part.quantization_config  # its weights are read as what they stand for
        return config

    def _read_files(self) -> dict[str, str]:
        """Tensor name -> file name, files in order of their names, tensors as the file lists them."""
        entry = entry_file(self.folder, getattr(self.config, "transformers_weights", None))
        listed = indexed_files(self.folder / entry) if entry.endswith(".json") else {}
        files: dict[str, str] = {}
        specs: dict[str, Spec] = {}
        for file in sorted(set(listed.values())) or [entry]:
            opened = self._open(file)
            keys = list(opened.keys())
            missing = {name for name, home in listed.items() if home == file}.difference(keys)
            if missing:
                raise ModelError(f"{self.folder / file} lacks {min(missing)} that the index promises", hint=AGAIN)
            files.update(dict.fromkeys(keys, file))
            parts = {key: opened.get_slice(key) for key in keys if self.settings or key.endswith("weight")}
            specs.update({key: (part.get_dtype(), tuple(part.get_shape())) for key, part in parts.items()})
        self._raw = dict(files)
        self._few = find_packed(specs, self.settings)
        self.packed = dict(self._few)
        for name, packed in self._few.items():
            for part in packed.parts:
                files.pop(part, None)
            files[name] = self._raw[packed.parts[0]]
        return {name: file for name, file in files.items() if not (self._few and name.endswith(BESIDE))}

    def _open(self, file: str) -> safe_open:
        path = regular_file(self.folder / file, ModelError)
        try:
            opened = safe_open(str(path), framework="pt")
        except FileNotFoundError:
            raise ModelError(f"shard {file} is missing from {self.folder}", hint=AGAIN) from None
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is not a whole safetensors file: {error}", hint="download it again") from error
        self._watch.check(file)
        return opened

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that transformers loads the model in: the config's, else that of its first floating tensor."""
        own = causal_class(self.config)[1]
        for config in (own, own.get_text_config(decoder=True)):
            if isinstance(declared := getattr(config, "dtype", None), torch.dtype):
                return declared
        return next((self.spec(name)[0] for name in self.files if self.spec(name)[0].is_floating_point), torch.float32)

    def digests(self) -> dict[str, str]:
        """sha256 of the config and of every weight file, for provenance and for resuming safely."""
        return {file: self._watch.digest(file) for file in ["config.json", *sorted(set(self._raw.values()))]}

    def check_unchanged(self) -> None:
        """Raise JobError, naming the file, unless all files are those that `digests` has seen."""
        self._watch.check_all()

    def skeleton(self) -> PreTrainedModel:
        """The model with every parameter on meta; buffers such as rotary frequencies are real, fp32.

        Experts are linears of their own (models/experts.py).

        Raises ModelError if the config describes no model, or one whose tensors are not those of the files.
        """
        model = self._build()
        ties = list(tied_parameters(model).items())
        bound = self._bind(model)
        self.untied = [(head, other) for head, other in ties if self._differ(bound.get(head), bound.get(other))]
        if self.untied:
            for config in (self.config, *_sub_configs(self.config)):
                if getattr(config, "tie_word_embeddings", False):
                    config.tie_word_embeddings = False
            model = self._build()
            bound = self._bind(model)
        self._stored = share(bound, ties)
        model.eval().requires_grad_(False)
        return model

    def _bind(self, model: PreTrainedModel) -> dict[str, str]:
        """State-dict name -> what `stored_name` says of it, after the experts of `model` were split.

        `files` has tensors that are made of others in their place from now on.
        """
        self.packed, self.files = dict(self._few), self._read
        bound, made, parts = bind(model, self._read, split_experts(model), self.spec)
        self.packed |= made
        used = {part for tensor in made.values() for part in tensor.parts}
        self.files = {name: file for name, file in self._read.items() if name not in used}
        self.files |= {name: self._read[tensor.parts[0]] for name, tensor in made.items()}
        self._parts = {f"{part.stored} of {name}": part for name, part in parts.items()}
        return bound | {name: f"{part.stored} of {name}" for name, part in parts.items()}

    def _build(self) -> PreTrainedModel:
        whole = causal_class(self.config)[1]
        layers = [getattr(config, "num_hidden_layers", None) for config in (whole, *_sub_configs(whole))]
        most = max((count for count in layers if isinstance(count, int)), default=0)
        if most > len(self.files):
            raise ModelError(
                f"{self.folder / 'config.json'} asks for {most} layers, the files hold {len(self.files)} tensors",
                hint="config.json and the weights are of different models",
            )
        try:
            with init_empty_weights(include_buffers=False):
                # a copy, because transformers writes the dtype into the config it is given
                kind, own = causal_class(copy.deepcopy(self.config))
                model = new_model(kind, own)
            model.tie_weights()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ModelError(
                f"{self.folder / 'config.json'} describes no model: {type(error).__name__}: {first_line(error)}",
                hint="download it again, or try the transformers version that the model was made with",
            ) from error
        return model

    def _differ(self, one: str | None, other: str | None) -> bool:
        """Whether two stored tensors, if both are, differ in the dtype that the model is loaded in."""
        if one is None or other is None or one == other:
            return False
        shape = self.spec(one)[1]
        if shape != self.spec(other)[1]:
            return True
        if not shape:
            return not torch.equal(self.map(one), self.map(other))
        step = max(1, READ_BYTES // max(1, 4 * torch.Size(shape[1:]).numel()))
        for start in range(0, shape[0], step):
            parts = [self.rows(name, start, start + step).to(self.dtype) for name in (one, other)]
            if not torch.equal(*parts):
                return True
        return False

    def stored_name(self, name: str) -> str | None:
        """The stored name of state-dict entry `name`; None if it is not stored. Needs `skeleton` first.

        Of what is a part of a stored tensor, a name of its own, which the methods here take as they take others.
        """
        return self._stored.get(name)

    def tensor_of(self, stored: str) -> str:
        """The tensor in the files that `stored` is, or is a part of."""
        return self._parts[stored].stored if stored in self._parts else stored

    def spec(self, stored: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """(dtype, shape) of a stored tensor, from the header; of one in few bits those of its numbers."""
        if stored in self._parts:
            return self.spec(self._parts[stored].stored)[0], self._parts[stored].shape
        if stored in self.packed:
            return self.packed[stored].dtype, self.packed[stored].shape
        part = self._open(self.files[stored]).get_slice(stored)
        dtype = part.get_dtype()
        if dtype not in SAFETENSORS_DTYPES:
            raise ModelError(
                f"{stored} is stored as {dtype}, which cannot be quantized", hint="use a model in bf16, fp16 or fp32"
            )
        return SAFETENSORS_DTYPES[dtype], tuple(part.get_shape())

    def kept_as(self, stored: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """(dtype, shape) of a stored tensor in a checkpoint that does not quantize it.

        What was stored in few bits gets the model's dtype, as transformers gives it back.
        """
        dtype, shape = self.spec(stored)
        found = self.packed.get(name := self.tensor_of(stored))
        parts = found.parts if isinstance(found, Converted) else (name,)
        return (self.dtype if self._few.keys() & parts else dtype), shape

    def map(self, stored: str) -> Tensor:
        """A stored tensor, memory-mapped: for reading once, not for keeping."""
        if stored in self._parts or stored in self.packed:
            return self.read(stored)
        tensor: Tensor = self._open(self.files[stored]).get_tensor(stored)
        return tensor

    def rows(self, stored: str, start: int, stop: int) -> Tensor:
        """Rows start..stop-1 of a stored tensor, copied out of the file."""
        if stored in self._parts:
            return self.read(stored)[start:stop]
        if stored in self.packed:
            packed = self.packed[stored]
            return packed.rows(start, stop, self.rows if isinstance(packed, Converted) else self._rows)
        return self._rows(stored, start, stop)

    def _rows(self, stored: str, start: int, stop: int) -> Tensor:
        file = self._raw[stored]
        with self._open(file) as opened:
            part = opened.get_slice(stored)
            rows: Tensor = part[start:stop].clone() if part.get_shape() else opened.get_tensor(stored).clone()
        self._watch.check(file)
        return rows

    def read(self, stored: str) -> Tensor:
        """A stored tensor, copied out of the file so that nothing stays mapped."""
        dtype, shape = self.spec(stored)
        if stored in self._parts:
            part = self._parts[stored]  # of one expert; no other is read
            entry = self.rows(part.stored, part.expert, part.expert + 1)[0]
            return part.of(entry).clone(memory_format=torch.contiguous_format)
        packed = self.packed.get(stored)
        if isinstance(packed, Converted) and not packed.conversion.by_rows:  # each stretch would read all parts
            return self.rows(stored, 0, shape[0])
        if not shape:
            return self.map(stored).clone()
        result = torch.empty(shape, dtype=dtype, device="cpu")
        step = max(1, READ_BYTES // max(1, result[:1].nbytes))
        for start in range(0, shape[0], step):
            # opened anew for each stretch, so that only one stretch of the file is resident at a time
            result[start : start + step] = self.rows(stored, start, min(start + step, shape[0]))
        return result

    def materialise(
        self, module: nn.Module, prefix: str, skip: Iterable[str] = (), narrow: Collection[str] = ()
    ) -> None:
        """Fill the meta parameters and persistent buffers of `module`, at `prefix` in the skeleton.

        They are fp32, but those in `narrow` as they are stored.

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
                value = value if full in narrow else value.float()
            parent, _, leaf = key.rpartition(".")
            owner = module.get_submodule(parent)
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                owner._buffers[leaf] = value

    def whole(self, dtype: torch.dtype) -> PreTrainedModel:
        """The whole model in memory, in `dtype`; for a moment also in fp32."""
        model = self.skeleton()
        self.materialise(model, "")
        model.tie_weights()
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model


def _sub_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    parts = [getattr(config, key, None) for key in config.sub_configs]
    return [part for part in parts if isinstance(part, PreTrainedConfig)]


def release(module: nn.Module) -> None:
    """Send parameters back to meta, so that their memory is free again; tied ones stay tied."""
    empty: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None and not parameter.is_meta:
                if id(parameter) not in empty:
                    empty[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=False)
                owner._parameters[key] = empty[id(parameter)]


def load_reference(
    reference: str | Path | PreTrainedModel | None,
    quantized: PreTrainedModel,
    device: torch.device,
    hub: FromHub,
) -> PreTrainedModel | None:
    """The model to compare with, in the dtype of `quantized`; `hub` says how a hub id is fetched.

    Raises ModelError if it has another vocabulary.
    """
    if reference is None:
        return None
    original = reference if isinstance(reference, PreTrainedModel) else _read_reference(reference, quantized.dtype, hub)
    sizes = [model.config.get_text_config().vocab_size for model in (original, quantized)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"the reference has another vocabulary than the quantized model: {sizes[0]} tokens, not {sizes[1]}",
            hint="give the model that was quantized",
        )
    nn.Module.to(original, device)
    original.eval()
    return original


def _read_reference(reference: str | Path, dtype: torch.dtype, hub: FromHub) -> PreTrainedModel:
    folder = resolve(reference, hub=hub, kind="reference model")
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        if getattr(config, "quantization_config", None) and not is_checkpoint(folder):
            return SourceModel(folder).whole(dtype)  # transformers runs few bits on some machines only
        loaded: Any = causal_class(config)[0].from_pretrained(
            str(folder),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"the reference {folder} cannot be loaded: {first_line(error)}") from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:  # transformers has left them random
        raise ModelError(f"the reference {folder} stores no tensor for {missing[0]}", hint="download it again")
    return model
