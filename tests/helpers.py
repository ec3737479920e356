"""Builders shared by the tests."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bitstrata.checkpoint import LayerSpec, QuantizationSpec, TensorEntry, entries_of, format_version, write_checkpoint
from bitstrata.nn import BitsState, Experts, PlaneLinear
from bitstrata.planes import (
    AffineScales,
    ByteScales,
    Codebook,
    PlaneWeight,
    Scales,
    decode,
    group_count,
    pack_bits,
)
from bitstrata.planes.weights import BYTE_BITS


def random_weight(
    N: int,
    K: int,
    bits: Sequence[int] = (2, 3, 4),
    group_size: int = 32,
    kind: str = "affine",
    seed: int = 0,
) -> PlaneWeight:
    """A weight [N, K] with random planes and, for each of `bits`, random scales.

    Scales of plane i are about 2**-i, as in a real weight, so that entries are of order one. Every
    set is drawn independently: a test that mixes up two of them fails.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    planes = tuple(pack_bits(torch.rand(N, K, generator=generator) < 0.5) for _ in range(max(bits)))
    groups = group_count(K, group_size)
    scales: dict[int, Scales] = {}
    for value in bits:
        if kind == "affine8" and value <= BYTE_BITS:
            exponent = torch.randint(-4, -2, (N,), generator=generator)
            unit = torch.randint(8, 16, (N,), generator=generator) * torch.exp2(exponent)
            scale = (96 + 12 * normal(value, N, groups)).clamp(-127, 127).to(torch.int8)
            offset = (12 * normal(N, groups)).clamp(-127, 127).to(torch.int8)
            scales[value] = ByteScales(scale, offset, unit.half())
        elif kind in ("affine", "affine8"):
            size = torch.exp2(-torch.arange(value, dtype=torch.float32)).view(-1, 1, 1)
            scale = size * (0.75 + 0.1 * normal(value, N, groups))
            scales[value] = AffineScales(scale.half(), (0.1 * normal(N, groups)).half())
        elif kind == "codebook":
            scales[value] = Codebook(normal(N, 2**value).half())
        else:
            raise ValueError(f"unknown scales {kind!r}")
    return PlaneWeight(planes, scales, K, group_size)


def spec_of(layers: Mapping[str, PlaneWeight], bits: Sequence[int], group_size: int) -> QuantizationSpec:
    """The quantization_config of a checkpoint of `layers`; bits and group size that differ become exceptions."""
    described = {
        name: LayerSpec(
            in_features=weight.in_features,
            out_features=weight.out_features,
            decoder=weight.kind,
            bits=None if weight.bits == tuple(bits) else list(weight.bits),
            group_size=None if weight.group_size == group_size else weight.group_size,
        )
        for name, weight in layers.items()
    }
    return QuantizationSpec(
        format_version=format_version(described.values()),
        method="test",
        bits=list(bits),
        group_size=group_size,
        layers=described,
    )


def save_checkpoint(
    folder: Path,
    layers: Mapping[str, PlaneWeight],
    *,
    bits: Sequence[int] = (2, 3, 4),
    group_size: int = 32,
    common: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `layers`, their guards and the unquantized tensors `common` as a checkpoint."""
    entries = [TensorEntry.of(name, tensor) for name, tensor in (common or {}).items()]
    for name, weight in layers.items():
        entries += [*entries_of(name, weight), TensorEntry.of(f"{name}.weight", torch.empty(0))]
    spec = spec_of(layers, bits, group_size).model_dump(exclude_none=True)
    write_checkpoint(folder, {"model_type": "test", "quantization_config": spec}, entries)


def assert_same_weight(found: PlaneWeight, expected: PlaneWeight) -> None:
    """The two hold the same tensors, bit for bit."""
    assert (found.in_features, found.group_size, found.bits) == (
        expected.in_features,
        expected.group_size,
        expected.bits,
    )
    assert found.tensors().keys() == expected.tensors().keys()
    for name, tensor in expected.tensors().items():
        assert found.tensors()[name].dtype == tensor.dtype, name
        assert torch.equal(found.tensors()[name], tensor), name


def largest_error(y: Tensor, exact: Tensor) -> float:
    """The largest absolute difference from `exact`, infinite if anything is NaN."""
    return (y.double() - exact).abs().nan_to_num(nan=torch.inf).max().item()


def assert_linear_close(y: Tensor, x: Tensor, W: Tensor, message: str) -> None:
    """y = x @ W^T with at most twice the error of F.linear in x's dtype; W is exact, float64 [N, K].

    The escape is for the cases where F.linear happens to be nearly exact: one unit in the last place
    of the largest output, and the float32 rounding of a sum of K terms in another order.
    """
    exact = x.double() @ W.T  # [..., N]
    assert y.dtype == x.dtype, message
    assert y.shape == exact.shape, message
    if not y.numel():
        return
    baseline = largest_error(torch.nn.functional.linear(x, W.to(x.dtype)), exact)
    ulp = torch.finfo(x.dtype).eps + x.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps
    error = largest_error(y, exact)
    limit = 2 * baseline + ulp * exact.abs().max().item()
    assert error <= limit, f"{message}: error {error:.3g} > {limit:.3g}, F.linear has {baseline:.3g}"


def plane_model(seed: int = 0, *, bits: Sequence[int] = (2, 3, 4), bias: bool = False) -> torch.nn.Sequential:
    """Two PlaneLinear layers, 70 -> 33 affine named "0" and 33 -> 5 codebook named "1", sharing one BitsState."""
    weights = [
        random_weight(33, 70, bits, 32, "affine", seed),
        random_weight(5, 33, bits, 32, "codebook", seed + 1),
    ]
    state = BitsState({str(index): weight.bits for index, weight in enumerate(weights)})
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Sequential(
        *(
            PlaneLinear.from_weight(
                weight,
                torch.randn(weight.out_features, generator=generator) if bias else None,
                name=str(index),
                state=state,
            )
            for index, weight in enumerate(weights)
        )
    )


def dense_output(model: torch.nn.Sequential, x: Tensor, *bits: int) -> Tensor:
    """What `plane_model` has to compute with layer i at bits[i], from decoded weights in x's dtype."""
    for layer, value in zip(model, bits, strict=True):
        x = torch.nn.functional.linear(x, decode(layer.plane_weight(), value, x.dtype))
        if layer.bias is not None:
            x = x + layer.bias
    return x


def with_decoded_weights(original: PreTrainedModel, quantized: PreTrainedModel, bits: int) -> PreTrainedModel:
    """A copy of the original whose linears, and merged experts, hold the decoded weights."""
    dense = copy.deepcopy(original)
    experts = {name: module for name, module in quantized.named_modules() if isinstance(module, Experts)}
    for name, layer in quantized.named_modules():
        if isinstance(layer, PlaneLinear) and not any(name.startswith(f"{around}.") for around in experts):
            weight = decode(layer.plane_weight(), bits if bits in layer.bits else layer.bits[0])  # a head has one
            linear = dense.get_submodule(name)
            linear.weight.data = weight.T.contiguous() if isinstance(linear, Conv1D) else weight
    for name, module in experts.items():
        _fill_merged(dense.get_submodule(name), module, bits)
    return dense


def _fill_merged(merged: nn.Module, experts: Experts, bits: int) -> None:
    """The decoded weights of `experts` in transformers' own layout."""
    turned = getattr(merged, "is_transposed", type(merged).__name__.startswith("Llama4"))
    for expert in range(experts.expert_count):
        weights = {
            name: decode(experts.get_submodule(f"{expert}.{name}").plane_weight(), bits) for name in experts.projections
        }
        into = weights["up_proj"]
        if "gate_proj" in weights:
            both = [weights["gate_proj"], into]
            interleaved = not getattr(merged, "is_concatenated", True)
            into = torch.stack(both, 1).flatten(0, 1) if interleaved else torch.cat(both)
        first = merged.gate_up_proj if "gate_proj" in weights else merged.up_proj
        first.data[expert] = into.T if turned else into
        merged.down_proj.data[expert] = weights["down_proj"].T if turned else weights["down_proj"]
