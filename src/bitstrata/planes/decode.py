"""The reference: the specification of the format, obvious and slow.

    affine    W[n, k] = offset[n, j] + sum_{i<bits} scale[i, n, j] B_i[n, k],   j = k div group_size
    affine8   the same, its coefficients from bytes (ByteScales)
    codebook  W[n, k] = table[n, code],   code = sum_{i<bits} b_i 2^(bits-1-i)

with B_i = 2 b_i - 1 in {-1, +1}. In float64 the sum is exact: up to nine fp16 terms span fewer
than 53 bits. In any other dtype it is accumulated in float32, offset first, then planes 0, 1, ...,
and converted once at the end. Kernels are compared with this one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pack import unpack_bits
from .weights import Codebook, PlaneWeight, group_count

CHUNK = 1 << 20  # weights decoded at a time: bounds the temporaries, and they stay in cache


def signs(weight: PlaneWeight, plane: int, dtype: torch.dtype = torch.int8) -> Tensor:
    """Plane `plane` as -1 and +1: [N, K] in `dtype`."""
    return unpack_bits(weight.planes[plane], weight.in_features).to(dtype).mul_(2).sub_(1)


def codes(weight: PlaneWeight, bits: int) -> Tensor:
    """The first `bits` plane bits of every weight as an integer, plane 0 most significant: int64 [N, K]."""
    code = torch.zeros(weight.out_features, weight.in_features, dtype=torch.int64, device=weight.planes[0].device)
    for index in range(bits):
        code = code * 2 + unpack_bits(weight.planes[index], weight.in_features)
    return code


def decode(weight: PlaneWeight, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight at `bits`: [N, K] in `dtype`. Raises KeyError if there are no scales for `bits`."""
    result = torch.empty(weight.out_features, weight.in_features, dtype=dtype, device=weight.planes[0].device)
    step = max(1, CHUNK // weight.in_features)
    for start in range(0, weight.out_features, step):
        result[start : start + step] = _decode_outputs(weight.outputs(start, start + step), bits, dtype)
    return result


def _decode_outputs(weight: PlaneWeight, bits: int, dtype: torch.dtype) -> Tensor:
    scales = weight.scales[bits]
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    if isinstance(scales, Codebook):
        return scales.table.to(dtype).gather(1, codes(weight, bits))

    scales = scales.affine()
    columns = weight.in_features
    size = min(weight.group_size, columns)
    groups = group_count(columns, size)
    total = scales.offset.to(accumulate).unsqueeze(-1).repeat(1, 1, size)  # [N, J, g]
    for index in range(bits):
        plane = torch.nn.functional.pad(signs(weight, index, accumulate), (0, groups * size - columns))
        total += scales.scale[index].to(accumulate).unsqueeze(-1) * plane.view(len(plane), groups, size)
    return total.flatten(1)[:, :columns].to(dtype)
