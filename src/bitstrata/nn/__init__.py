"""The layer that runs from planes, and the state that tells it at how many bits."""

from .bits import Assignment, Bits, BitsOrPlan, BitsState, bits_state, together, use_bits
from .embedding import PlaneEmbedding, TiedHead
from .experts import Experts, StoredExperts
from .layers import fuse, multiplied_layers, steady_rows
from .linear import PlaneLinear
from .stored import PlaneModule

__all__ = [
    "Assignment",
    "Bits",
    "BitsOrPlan",
    "BitsState",
    "Experts",
    "PlaneEmbedding",
    "PlaneLinear",
    "PlaneModule",
    "StoredExperts",
    "TiedHead",
    "bits_state",
    "fuse",
    "multiplied_layers",
    "steady_rows",
    "together",
    "use_bits",
]
