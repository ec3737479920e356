"""Passes of a model over a cache of its own: many requests in one batch (`Engine`), one caller alone (`session_of`)."""

from .continuation import Continuation
from .drafts import Drafts
from .engine import Engine
from .graph import captured
from .lowering import Lowering, Lowerings
from .masks import Mask
from .prefixes import REUSE, check_reuse
from .request import Event, Finished, Handle, Request, Scored, Token
from .sampling import Sampler
from .session import Session, session_of
from .stats import EngineStats

__all__ = [
    "REUSE",
    "Continuation",
    "Drafts",
    "Engine",
    "EngineStats",
    "Event",
    "Finished",
    "Handle",
    "Lowering",
    "Lowerings",
    "Mask",
    "Request",
    "Sampler",
    "Scored",
    "Session",
    "Token",
    "captured",
    "check_reuse",
    "session_of",
]
