"""Quantized models to export, and a tiny Llama whose tokenizer is one that other programs know."""

from __future__ import annotations

from quantized_models import quantized  # noqa: F401  (a fixture)
