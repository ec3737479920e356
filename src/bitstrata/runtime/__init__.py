"""Running a quantized model: text generation, many requests in one batch, and what can run here."""

from ..options import GenerationSettings
from .batching import Engine, EngineStats, Event, Finished, Handle, Request, Scored, Token
from .constraints import Constraint
from .conversation import Conversation
from .environment import Environment, env
from .generation import Generation, continue_tokens, generate, policy_of
from .inspection import Inspection, inspect
from .policy import POLICIES, EntropyPolicy, LoadPolicy, Policy, PositionPolicy, StructurePolicy, parse_policy

__all__ = [
    "POLICIES",
    "Constraint",
    "Conversation",
    "Engine",
    "EngineStats",
    "EntropyPolicy",
    "Environment",
    "Event",
    "Finished",
    "Generation",
    "GenerationSettings",
    "Handle",
    "Inspection",
    "LoadPolicy",
    "Policy",
    "PositionPolicy",
    "Request",
    "Scored",
    "StructurePolicy",
    "Token",
    "continue_tokens",
    "env",
    "generate",
    "inspect",
    "parse_policy",
    "policy_of",
]
