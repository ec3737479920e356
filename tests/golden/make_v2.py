"""Make the golden checkpoint of format version 2: `python tests/golden/make_v2.py FOLDER`.

Run once, as `make_v1.py` was and under the same promise. Version 2 adds layers with a role: here an
embedding whose planes a tied head multiplies by, and an output head of its own with a bias.
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
from bitstrata.planes import AffineScales, PlaneWeight, pack_bits

BITS = (2, 3)
GROUP_SIZE = 32
LINEAR, EMBEDDING, HEAD = "model.layers.0.mlp.up_proj", "model.embed_tokens", "score"
LAYERS = {
    LINEAR: LayerSpec(in_features=70, out_features=5),
    EMBEDDING: LayerSpec(in_features=70, out_features=9, bits=[5], role="embedding", tied="lm_head"),
    HEAD: LayerSpec(in_features=33, out_features=4, bits=[6], group_size=16, role="head", bias=True),
}


def supported(layer: str) -> tuple[int, ...]:
    return tuple(LAYERS[layer].bits or BITS)


def group_size(layer: str) -> int:
    return LAYERS[layer].group_size or GROUP_SIZE


def expected_weight(layer: str, bits: int) -> Tensor:
    """The weight at `bits`, from the definition: float64 [N, K]."""
    rows = []
    for n in range(LAYERS[layer].out_features):
        row = []
        for k in range(LAYERS[layer].in_features):
            j = k // group_size(layer)
            value = offset(bits, n, j)
            for plane in range(bits):
                value += scale(bits, plane, n, j) * (2 * bit(layer, plane, n, k) - 1)
            row.append(value)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def weight(layer: str) -> PlaneWeight:
    """The same weight as planes and scales."""
    N, K = LAYERS[layer].out_features, LAYERS[layer].in_features
    groups = range(-(-K // group_size(layer)))
    planes = tuple(
        pack_bits(torch.tensor([[bit(layer, plane, n, k) for k in range(K)] for n in range(N)]))
        for plane in range(max(supported(layer)))
    )
    scales = {}
    for bits in supported(layer):
        steps = [[[scale(bits, i, n, j) for j in groups] for n in range(N)] for i in range(bits)]
        offsets = [[offset(bits, n, j) for j in groups] for n in range(N)]
        scales[bits] = AffineScales(torch.tensor(steps).half(), torch.tensor(offsets).half())
    return PlaneWeight(planes, scales, K, group_size(layer))


def write(folder: Path) -> None:
    """Write the checkpoint to `folder`."""
    spec = QuantizationSpec(
        format_version=2, method="golden", bits=list(BITS), group_size=GROUP_SIZE, layers=LAYERS, provenance={}
    )
    entries = [
        TensorEntry.of("model.norm.weight", torch.ones(3)),
        TensorEntry.of(f"{HEAD}.bias", torch.tensor([0.0, 0.25, -0.5, 1.0])),
    ]
    for layer in LAYERS:
        entries += [*entries_of(layer, weight(layer)), TensorEntry.of(f"{layer}.weight", torch.empty(0))]
    config = {"model_type": "golden", "quantization_config": spec.model_dump(exclude_none=True)}
    write_checkpoint(folder, config, entries, report={"note": "nothing was measured"})


def write_expected(path: Path) -> None:
    """Write the expected weights, float64, as `<layer>@<bits>`."""
    named = {f"{layer}@{bits}": expected_weight(layer, bits) for layer in LAYERS for bits in supported(layer)}
    write_safetensors(path, [TensorEntry.of(name, tensor) for name, tensor in named.items()])


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write(target / "v2")
    write_expected(target / "v2_expected.safetensors")
