"""Texts as token windows, and a model run block by block with bounded memory."""

from .block_runner import BlockRunner
from .data import Windows, calibration_windows, evaluation_windows, given_tokens, read_text, text_digest
from .fisher import fisher_bytes, fisher_diagonal
from .passes import Passes, fast_products, open_passes

__all__ = [
    "BlockRunner",
    "Passes",
    "Windows",
    "calibration_windows",
    "evaluation_windows",
    "fast_products",
    "fisher_bytes",
    "fisher_diagonal",
    "given_tokens",
    "open_passes",
    "read_text",
    "text_digest",
]
