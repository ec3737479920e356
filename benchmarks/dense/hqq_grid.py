"""HQQ: half-quadratic quantization, which looks at weights alone.

    hqq:bits=2:group_size=64

Its own solver at its own settings (axis 1, optimized zeros). Groups run on over the ends of rows where rows are no
multiple of them. Bytes are those of its packed codes (3 bits: ten to a word of 32) with a fp16 scale and zero a group.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from torch import Tensor

from .made import Job, Made, Options, one_by_one, taken


def missing() -> str | None:
    return None if importlib.util.find_spec("hqq") else "hqq cannot be imported"


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"hqq": version("hqq")}


def make(job: Job, options: Options) -> Iterator[Made]:
    from hqq.core.quantize import Quantizer

    bits, group = int(taken(options, "bits", "2")), int(taken(options, "group_size", "64"))

    def quantized(name: str, weight: Tensor) -> tuple[Tensor, int]:
        codes, meta = Quantizer.quantize(weight, nbits=bits, group_size=group, axis=1, device="cpu")
        size = codes.nbytes
        for key in ("scale", "zero"):
            stored = meta[key].half()
            meta[key], size = stored.float(), size + stored.nbytes
        return Quantizer.dequantize(codes, meta).view_as(weight), size

    weights, size = one_by_one(job, quantized)
    yield Made(bits, weights, size)
