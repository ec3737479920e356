"""Make the golden checkpoint of format version 3: `python tests/golden/make_v3.py FOLDER`.

Run once, as `make_v1.py` was and under the same promise. Version 3 adds coefficients in bytes, up to four bits;
above that they are fp16 as before.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from make_v1 import bit, offset, scale
from torch import Tensor

from bitstrata.checkpoint import (
    LayerSpec,
    QuantizationSpec,
    TensorEntry,
    entries_of,
    write_checkpoint,
    write_safetensors,
)
from bitstrata.planes import AffineScales, ByteScales, PlaneWeight, Scales, pack_bits

BITS = (1, 4, 5)
GROUP_SIZE = 32
LAYER = "model.layers.0.mlp.up_proj"
N, K = 5, 70
SPEC = LayerSpec(in_features=K, out_features=N, decoder="affine8")
GROUPS = range(-(-K // GROUP_SIZE))


def unit(n: int) -> float:
    """From the smallest one there can be to the largest."""
    return (2.0**-14, 0.1875, 0.0, 13.0, 61440.0)[n]


def byte_scale(bits: int, i: int, n: int, j: int) -> int:
    return (37 * bits + 11 * i + 53 * n + 71 * j) % 256 - 128


def byte_offset(bits: int, n: int, j: int) -> int:
    return (29 * bits + 17 * n + 101 * j) % 256 - 128


def coefficients(bits: int, n: int, j: int) -> tuple[list[float], float]:
    """Scales and offset of a group, from the definition."""
    if bits > 4:
        return [scale(bits, i, n, j) for i in range(bits)], offset(bits, n, j)
    scales = [byte_scale(bits, i, n, j) * unit(n) / 2 ** (7 + i) for i in range(bits)]
    return scales, byte_offset(bits, n, j) * unit(n) / 2**7


def expected_weight(bits: int) -> Tensor:
    """The weight at `bits`, from the definition: float64 [N, K]."""
    rows = []
    for n in range(N):
        row = []
        for k in range(K):
            scales, value = coefficients(bits, n, k // GROUP_SIZE)
            for plane in range(bits):
                value += scales[plane] * (2 * bit(LAYER, plane, n, k) - 1)
            row.append(value)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def scales(bits: int) -> Scales:
    if bits > 4:
        scales = [[[scale(bits, i, n, j) for j in GROUPS] for n in range(N)] for i in range(bits)]
        offsets = [[offset(bits, n, j) for j in GROUPS] for n in range(N)]
        return AffineScales(torch.tensor(scales).half(), torch.tensor(offsets).half())
    signed = [[[byte_scale(bits, i, n, j) for j in GROUPS] for n in range(N)] for i in range(bits)]
    shifts = [[byte_offset(bits, n, j) for j in GROUPS] for n in range(N)]
    units = torch.tensor([unit(n) for n in range(N)]).half()
    return ByteScales(torch.tensor(signed).to(torch.int8), torch.tensor(shifts).to(torch.int8), units)


def weight() -> PlaneWeight:
    """The same weight as planes and scales."""
    planes = tuple(
        pack_bits(torch.tensor([[bit(LAYER, plane, n, k) for k in range(K)] for n in range(N)]))
        for plane in range(max(BITS))
    )
    return PlaneWeight(planes, {bits: scales(bits) for bits in BITS}, K, GROUP_SIZE)


def write(folder: Path) -> None:
    """Write the checkpoint to `folder`."""
    spec = QuantizationSpec(
        format_version=3, method="golden", bits=list(BITS), group_size=GROUP_SIZE, layers={LAYER: SPEC}, provenance={}
    )
    entries = [TensorEntry.of("model.norm.weight", torch.ones(3))]
    entries += [*entries_of(LAYER, weight()), TensorEntry.of(f"{LAYER}.weight", torch.empty(0))]
    config = {"model_type": "golden", "quantization_config": spec.model_dump(exclude_none=True)}
    write_checkpoint(folder, config, entries, report={"note": "nothing was measured"})


def write_expected(path: Path) -> None:
    """Write the expected weights, float64, as `<layer>@<bits>`."""
    write_safetensors(path, [TensorEntry.of(f"{LAYER}@{bits}", expected_weight(bits)) for bits in BITS])


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write(target / "v3")
    write_expected(target / "v3_expected.safetensors")
