"""The layer that runs from planes, and the state that tells it at how many bits."""

from .bits import Bits, BitsState, FixedBits, Precision, RowBits, bits_state, parse_bits, use_bits
from .embedding import PlaneEmbedding, TiedHead
from .fused import fuse
from .layers import multiplied_layers, steady_rows
from .linear import PlaneLinear
from .resident import ResidentState
from .stored import PlaneModule

__all__ = [
    "Bits",
    "BitsState",
    "FixedBits",
    "PlaneEmbedding",
    "PlaneLinear",
    "PlaneModule",
    "Precision",
    "ResidentState",
    "RowBits",
    "TiedHead",
    "bits_state",
    "fuse",
    "multiplied_layers",
    "parse_bits",
    "steady_rows",
    "use_bits",
]
