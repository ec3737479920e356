"""Planes and scales on disk: schema, writer, reader, validator. FORMAT.md is the one-page contract."""

from .budget import Budget, ModelSizes, PlanBytes, bytes_text, parse_budget
from .fetch import PageReader
from .pages import PAGES_FILE, Page, PageOrder
from .plan import Fingerprint, Plan
from .reader import CheckpointReader, is_checkpoint
from .schema import FORMAT_VERSION, QUANT_METHOD, LayerSpec, QuantizationSpec, format_version
from .validate import validate
from .writer import (
    TensorEntry,
    copy_file,
    entries_of,
    has_right_seal,
    remove_leftovers,
    write_checkpoint,
    write_json,
    write_safetensors,
)

__all__ = [
    "FORMAT_VERSION",
    "PAGES_FILE",
    "QUANT_METHOD",
    "Budget",
    "CheckpointReader",
    "Fingerprint",
    "LayerSpec",
    "ModelSizes",
    "Page",
    "PageOrder",
    "PageReader",
    "Plan",
    "PlanBytes",
    "QuantizationSpec",
    "TensorEntry",
    "bytes_text",
    "copy_file",
    "entries_of",
    "format_version",
    "has_right_seal",
    "is_checkpoint",
    "parse_budget",
    "remove_leftovers",
    "validate",
    "write_checkpoint",
    "write_json",
    "write_safetensors",
]
