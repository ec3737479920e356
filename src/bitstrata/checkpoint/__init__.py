"""Planes and scales on disk: schema, writer, reader, validator. FORMAT.md is the one-page contract."""

from .fingerprint import Fingerprint
from .reader import CheckpointReader, is_checkpoint
from .schema import FORMAT_VERSION, QUANT_METHOD, LayerSpec, QuantizationSpec, format_version
from .validate import validate
from .writer import (
    TensorEntry,
    copy_file,
    entries_of,
    has_right_seal,
    merge_experts,
    remove_leftovers,
    write_checkpoint,
    write_json,
    write_safetensors,
)

__all__ = [
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "CheckpointReader",
    "Fingerprint",
    "LayerSpec",
    "QuantizationSpec",
    "TensorEntry",
    "copy_file",
    "entries_of",
    "format_version",
    "has_right_seal",
    "is_checkpoint",
    "merge_experts",
    "remove_leftovers",
    "validate",
    "write_checkpoint",
    "write_json",
    "write_safetensors",
]
