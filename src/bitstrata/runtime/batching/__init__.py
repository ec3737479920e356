"""Passes of a model over a cache of its own: many requests in one batch (`Engine`), one caller alone (`session`)."""

from .drafts import Drafts
from .engine import Engine
from .request import Event, Finished, Handle, Request, Token
from .sampling import Sampler
from .session import Session, session
from .stats import EngineStats

__all__ = [
    "Drafts",
    "Engine",
    "EngineStats",
    "Event",
    "Finished",
    "Handle",
    "Request",
    "Sampler",
    "Session",
    "Token",
    "session",
]
