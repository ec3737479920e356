"""`bitstrata.demo`: the main job on a bundled real model, offline."""

from .run import Demo, demo

__all__ = ["Demo", "demo"]
