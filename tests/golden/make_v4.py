"""Make the golden checkpoint of format version 4: `python tests/golden/make_v4.py FOLDER`.

Run once, as `make_v1.py` was and under the same promise. Version 4 adds layers of experts, stored in one tensor each.
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
    merge_experts,
    write_checkpoint,
    write_safetensors,
)
from bitstrata.planes import AffineScales, PlaneWeight, pack_bits

BITS = (1, 3)
GROUP_SIZE = 32
STORED = "model.layers.0.mlp.experts.up_proj"
EXPERTS, N, K = 3, 5, 70
LAYERS = [f"model.layers.0.mlp.experts.{expert}.up_proj" for expert in range(EXPERTS)]
SPEC = LayerSpec(in_features=K, out_features=N, bias=True, experts=EXPERTS, active=2)
GROUPS = range(-(-K // GROUP_SIZE))


def row(layer: str, n: int) -> int:
    """Row n of an expert, counted through all of them."""
    return n + N * LAYERS.index(layer)


def expected_weight(layer: str, bits: int) -> Tensor:
    """An expert's weight at `bits`, from the definition: float64 [N, K]."""
    rows = []
    for n in range(N):
        values = []
        for k in range(K):
            j = k // GROUP_SIZE
            value = offset(bits, row(layer, n), j)
            for plane in range(bits):
                value += scale(bits, plane, row(layer, n), j) * (2 * bit(layer, plane, n, k) - 1)
            values.append(value)
        rows.append(values)
    return torch.tensor(rows, dtype=torch.float64)


def weight(layer: str) -> PlaneWeight:
    """The same weight as planes and scales."""
    planes = tuple(
        pack_bits(torch.tensor([[bit(layer, plane, n, k) for k in range(K)] for n in range(N)]))
        for plane in range(max(BITS))
    )
    scales = {
        bits: AffineScales(
            torch.tensor(
                [[[scale(bits, i, row(layer, n), j) for j in GROUPS] for n in range(N)] for i in range(bits)]
            ).half(),
            torch.tensor([[offset(bits, row(layer, n), j) for j in GROUPS] for n in range(N)]).half(),
        )
        for bits in BITS
    }
    return PlaneWeight(planes, scales, K, GROUP_SIZE)


def bias(layer: str) -> Tensor:
    return torch.tensor([row(layer, n) / 4 for n in range(N)])


def write(folder: Path) -> None:
    """Write the checkpoint to `folder`."""
    spec = QuantizationSpec(
        format_version=4, method="golden", bits=list(BITS), group_size=GROUP_SIZE, layers={STORED: SPEC}, provenance={}
    )
    entries = [TensorEntry.of("model.norm.weight", torch.ones(3))]
    for layer in LAYERS:
        entries += entries_of(layer, weight(layer))
        entries += [TensorEntry.of(f"{layer}.weight", torch.empty(0)), TensorEntry.of(f"{layer}.bias", bias(layer))]
    config = {"model_type": "golden", "quantization_config": spec.model_dump(exclude_none=True)}
    write_checkpoint(folder, config, merge_experts(spec, entries), report={"note": "nothing was measured"})


def write_expected(path: Path) -> None:
    """Write the expected weights, float64, as `<layer>@<bits>`."""
    names = [(layer, bits) for layer in LAYERS for bits in BITS]
    write_safetensors(path, [TensorEntry.of(f"{layer}@{bits}", expected_weight(layer, bits)) for layer, bits in names])


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write(target / "v4")
    write_expected(target / "v4_expected.safetensors")
