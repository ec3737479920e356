"""Make the golden checkpoint of format version 1: `python tests/golden/make_v1.py FOLDER`.

Run once, when the version was new; the files it wrote are committed as `v1/` and
`v1_expected.safetensors` and stay as they are. Every later release must read them to exactly the
expected weights, and, as long as it writes version 1, must write them again byte for byte. A change
of the format gets a version, a script and a folder of its own.

Bits, scales and tables follow from integer arithmetic alone, so the content depends on no random
generator; the expected weights are added up here in plain Python, without the package's scales.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from bitstrata.checkpoint import (
    LayerSpec,
    QuantizationSpec,
    TensorEntry,
    entries_of,
    write_checkpoint,
    write_safetensors,
)
from bitstrata.planes import AffineScales, Codebook, PlaneWeight, Scales, pack_bits

BITS = (2, 3, 4)
GROUP_SIZE = 32
AFFINE, CODEBOOK = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
SHAPES = {AFFINE: (5, 70), CODEBOOK: (3, 33)}  # [N, K]
GROUPS = 3  # of the affine layer


def mixed(*numbers: int) -> int:
    """A number below 2**16 that looks random and is the same everywhere."""
    value = 1
    for number in numbers:
        value = (value + number + 1) * 0x9E3779B1 % 2**32
        value ^= value >> 15
    return value >> 8 & 0xFFFF


def bit(layer: str, plane: int, n: int, k: int) -> int:
    return mixed(len(layer), plane, n, k) & 1


def scale(bits: int, plane: int, n: int, j: int) -> float:
    return (mixed(bits, plane, n, j, 1) % 512 + 1) / 1024 / 2**plane


def offset(bits: int, n: int, j: int) -> float:
    return (mixed(bits, n, j, 2) % 512 - 256) / 4096


def entry(bits: int, n: int, code: int) -> float:
    return (mixed(bits, n, code, 3) % 4096 - 2048) / 1024


def expected_weight(layer: str, bits: int) -> Tensor:
    """The weight at `bits`, from the definition: float64 [N, K]."""
    N, K = SHAPES[layer]
    rows = []
    for n in range(N):
        row = []
        for k in range(K):
            prefix = [bit(layer, plane, n, k) for plane in range(bits)]
            if layer == AFFINE:
                j = k // GROUP_SIZE
                value = offset(bits, n, j)
                for plane, b in enumerate(prefix):
                    value += scale(bits, plane, n, j) * (2 * b - 1)
            else:
                value = entry(bits, n, sum(b << (bits - 1 - plane) for plane, b in enumerate(prefix)))
            row.append(value)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def weight(layer: str) -> PlaneWeight:
    """The same weight as planes and scales."""
    N, K = SHAPES[layer]
    planes = tuple(
        pack_bits(torch.tensor([[bit(layer, plane, n, k) for k in range(K)] for n in range(N)]))
        for plane in range(max(BITS))
    )
    scales: dict[int, Scales] = {}
    for bits in BITS:
        if layer == AFFINE:
            steps = [[[scale(bits, i, n, j) for j in range(GROUPS)] for n in range(N)] for i in range(bits)]
            offsets = [[offset(bits, n, j) for j in range(GROUPS)] for n in range(N)]
            scales[bits] = AffineScales(torch.tensor(steps).half(), torch.tensor(offsets).half())
        else:
            table = [[entry(bits, n, code) for code in range(2**bits)] for n in range(N)]
            scales[bits] = Codebook(torch.tensor(table).half())
    return PlaneWeight(planes, scales, K, GROUP_SIZE)


def write(folder: Path) -> None:
    """Write the checkpoint to `folder`."""
    layers = {
        AFFINE: LayerSpec(in_features=70, out_features=5, bias=True),
        CODEBOOK: LayerSpec(in_features=33, out_features=3, decoder="codebook"),
    }
    spec = QuantizationSpec(
        method="golden",
        method_options={"note": "made by hand"},
        bits=list(BITS),
        group_size=GROUP_SIZE,
        layers=layers,
        provenance={"model": "none"},
    )
    entries = [
        TensorEntry.of("model.embed_tokens.weight", torch.arange(12, dtype=torch.bfloat16).view(4, 3)),
        TensorEntry.of("model.norm.weight", torch.ones(3)),
        TensorEntry.of(f"{AFFINE}.bias", torch.tensor([0.0, 0.25, -0.5, 1.0, -2.0])),
    ]
    for layer in layers:
        entries += [*entries_of(layer, weight(layer)), TensorEntry.of(f"{layer}.weight", torch.empty(0))]
    config = {"model_type": "golden", "quantization_config": spec.model_dump(exclude_none=True)}
    write_checkpoint(folder, config, entries, report={"note": "nothing was measured"})


def write_expected(path: Path) -> None:
    """Write the expected weights, float64, as `<layer>@<bits>`."""
    named = {f"{layer}@{bits}": expected_weight(layer, bits) for layer in SHAPES for bits in BITS}
    write_safetensors(path, [TensorEntry.of(name, tensor) for name, tensor in named.items()])


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write(target / "v1")
    write_expected(target / "v1_expected.safetensors")
