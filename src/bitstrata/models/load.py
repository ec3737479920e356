"""A runnable model from a checkpoint's folder, with only the planes that are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..checkpoint import CheckpointReader, Fingerprint
from ..errors import BitstrataError, CheckpointError, UsageError, first_line
from ..memory import is_out_of_memory
from ..nn import bits_state
from .config import causal_class, read_config, read_generation_config
from .hf import replace_layers


def pick_device(device: str | torch.device) -> torch.device:
    """`auto` is the first GPU if there is one, else the CPU. Raises UsageError for an unusable device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"{device!r} is not a device", hint="use auto, cpu, cuda or cuda:1") from error
    if chosen.type not in ("cpu", "cuda"):
        raise UsageError(f"device {device} is not supported", hint="use auto, cpu, cuda or cuda:1")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {device} was asked for, but this torch sees no GPU", hint="use --device cpu")
    if chosen.type == "cuda" and chosen.index is not None and chosen.index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise UsageError(f"device {device} was asked for, but the last GPU here is cuda:{last}", hint="use one of them")
    return chosen


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint whose description was read and found to be right; its weights come with `build`."""

    folder: Path
    reader: CheckpointReader
    config: PreTrainedConfig
    generation: GenerationConfig | None
    device: torch.device
    dtype: torch.dtype | None

    def build(self) -> PreTrainedModel:
        """The model, with all planes that the reader gives; of a `paged` one, without pages.

        Raises CheckpointError for tensors that are missing, malformed or not the model's.
        """
        # On a CPU the mapped file is the weight; elsewhere transformers copies tensor by tensor.
        placement: dict[str, Any] = {} if self.device.type == "cpu" else {"device_map": {"": self.device}}
        model = _build(self.folder, self.reader, self.config, self.dtype, placement)
        model.name_or_path = str(self.folder)
        if self.generation is not None:
            model.generation_config = self.generation
        bits_state(model).made_from = Fingerprint.of(self.reader)
        return model


def open_checkpoint(
    folder: Path,
    device: str | torch.device = "auto",
    *,
    max_bits: int | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    paged: bool = False,
) -> OpenCheckpoint:
    """A checkpoint to build a model from: whole, its first `max_bits` planes, or `paged`, without pages.

    Raises CheckpointError for a folder that is not one, UsageError for an unusable device.
    """
    where = pick_device(device)
    reader = CheckpointReader(folder, max_bits=max_bits, verify=verify, paged=paged)
    reader.note_changes()
    config = read_config(folder, reader)
    generation = read_generation_config(folder, getattr(config.get_text_config(decoder=True), "vocab_size", None))
    return OpenCheckpoint(folder, reader, config, generation, where, dtype)


def _build(
    folder: Path, reader: CheckpointReader, config: Any, dtype: torch.dtype | None, placement: dict[str, Any]
) -> PreTrainedModel:
    """The model with the reader's tensors in it; CheckpointError unless they fit it one to one."""
    tensors = reader.state_dict()
    try:
        if reader.paged:
            config.quantization_config = dict(config.quantization_config, paged=True)
        else:
            config.quantization_config = _restricted(config.quantization_config, reader)
        model_class, own = causal_class(config)
        own.quantization_config = config.quantization_config
        model, info = model_class.from_pretrained(
            None,
            config=own,
            state_dict=tensors,
            dtype=dtype or own.dtype or reader.dtype or torch.float32,
            output_loading_info=True,
            **placement,
        )
    except BitstrataError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = _misfit(folder, reader) or first_line(error)
        raise CheckpointError(
            f"{folder} does not fit the model that its config.json describes: {reason}",
            hint="the folder was changed after it was written; copy or download it again",
        ) from error
    for kind, what in (("missing_keys", "stores no tensor for"), ("unexpected_keys", "stores an unknown tensor")):
        if info[kind]:
            raise CheckpointError(
                f"{folder} {what} {min(info[kind])}", hint="config.json and the weights are of different models"
            )
    built: PreTrainedModel = model
    return built


def _misfit(folder: Path, reader: CheckpointReader) -> str | None:
    """The first tensor whose shape is not the model's, in words: transformers says that there is one, but not which.

    None if there is none, or if there can be no such model at all.
    """
    try:
        config = read_config(folder, reader)
        with torch.device("meta"):
            model_class, own = causal_class(config)
            model = model_class(own)
            replace_layers(model, reader.spec)
        shapes = {name: tuple(place.shape) for name, place in model.state_dict().items()}
    except Exception:
        return None
    for name in sorted(reader.common_names() & shapes.keys()):
        found = reader.tensor_spec(name)[1]
        if found != shapes[name]:
            return f"{name} is {list(found)} in {reader.weight_map[name]}, {list(shapes[name])} in the model"
    return None


def _restricted(raw: dict[str, Any], reader: CheckpointReader) -> dict[str, Any]:
    """The quantization config without the bits above the reader's max_bits."""
    spec = dict(raw, bits=list(reader.bits))
    spec["layers"] = {
        name: {**layer, "bits": list(reader.spec.layer_bits(name, reader.max_bits))} if layer.get("bits") else layer
        for name, layer in raw["layers"].items()
    }
    return spec
