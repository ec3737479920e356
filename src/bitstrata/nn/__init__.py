"""The layer that runs from planes, and the state that tells it at how many bits."""

from .bits import Bits, BitsState, bits_state, parse_bits, use_bits
from .fused import fuse
from .linear import PlaneLinear

__all__ = ["Bits", "BitsState", "PlaneLinear", "bits_state", "fuse", "parse_bits", "use_bits"]
