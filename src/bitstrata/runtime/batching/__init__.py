"""Many requests at different bits in one batch: `Engine`."""

from .engine import Engine
from .request import Event, Finished, Handle, Request, Token
from .stats import EngineStats

__all__ = ["Engine", "EngineStats", "Event", "Finished", "Handle", "Request", "Token"]
