"""Texts as token windows, and a model run block by block with bounded memory."""

from .block_runner import BlockRunner
from .data import SCORED, Windows, calibration_windows, evaluation_windows, given_tokens, read_text, text_digest
from .fisher import fisher_bytes, fisher_diagonal

__all__ = [
    "SCORED",
    "BlockRunner",
    "Windows",
    "calibration_windows",
    "evaluation_windows",
    "fisher_bytes",
    "fisher_diagonal",
    "given_tokens",
    "read_text",
    "text_digest",
]
