"""The representation: packed bit-planes, scales, and the reference that defines their meaning."""

from .decode import codes, decode, signs
from .pack import pack_bits, unpack_bits, words_per_row
from .weights import AffineScales, ByteScales, Codebook, PlaneWeight, Scales, group_count, whole_number

__all__ = [
    "AffineScales",
    "ByteScales",
    "Codebook",
    "PlaneWeight",
    "Scales",
    "codes",
    "decode",
    "group_count",
    "pack_bits",
    "signs",
    "unpack_bits",
    "whole_number",
    "words_per_row",
]
