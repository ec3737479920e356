"""Functions that a model may call: how it is told of them, how it calls, and what it may be held to."""

from .formats import PLAIN, ToolFormat, format_of
from .grammars import MOST_CALLS, calls_or, forced_calls
from .parsing import CallDelta, CallParser
from .scanning import Brackets
from .shown import Tool, shown_turns

__all__ = [
    "MOST_CALLS",
    "PLAIN",
    "Brackets",
    "CallDelta",
    "CallParser",
    "Tool",
    "ToolFormat",
    "calls_or",
    "forced_calls",
    "format_of",
    "shown_turns",
]
