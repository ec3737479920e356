"""Running a quantized model: text generation, many requests in one batch, and what can run here."""

from .batching import Engine, EngineStats, Event, Finished, Handle, Request, Token
from .conversation import Conversation, encode_turns
from .environment import Environment, env
from .generation import Generation, continue_prompt, encode_prompt, generate
from .inspection import Inspection, inspect

__all__ = [
    "Conversation",
    "Engine",
    "EngineStats",
    "Environment",
    "Event",
    "Finished",
    "Generation",
    "Handle",
    "Inspection",
    "Request",
    "Token",
    "continue_prompt",
    "encode_prompt",
    "encode_turns",
    "env",
    "generate",
    "inspect",
]
