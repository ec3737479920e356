"""Texts and chats as token windows, and a model run block by block with bounded memory."""

from .block_runner import BlockRunner
from .blockwise import BlockwiseModel, open_blockwise
from .chats import Chat, usable_chats, write_chat
from .data import SCORED, Windows, evaluation_windows, given_tokens, read_text
from .fisher import fisher_bytes, fisher_diagonal
from .made_chats import decision_chats
from .mix import Mix, Text, calibration_windows, documents_of, read_mix, text_digest, text_name

__all__ = [
    "SCORED",
    "BlockRunner",
    "BlockwiseModel",
    "Chat",
    "Mix",
    "Text",
    "Windows",
    "calibration_windows",
    "decision_chats",
    "documents_of",
    "evaluation_windows",
    "fisher_bytes",
    "fisher_diagonal",
    "given_tokens",
    "open_blockwise",
    "read_mix",
    "read_text",
    "text_digest",
    "text_name",
    "usable_chats",
    "write_chat",
]
