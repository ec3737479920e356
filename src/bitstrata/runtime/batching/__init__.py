"""Many requests at different bits in one batch: `Engine`."""

from .engine import Engine, EngineStats
from .request import Event, Finished, Handle, Request, Token

__all__ = ["Engine", "EngineStats", "Event", "Finished", "Handle", "Request", "Token"]
