"""Launching the device code: which arguments, and how many programs. Nothing here waits for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import config as configs
from .attention import append as append_rows
from .attention import attend_chunk, attend_whole
from .decoding import decode_rows, many_rows
from .few_rows import few_rows_affine, few_rows_codebook
from .tiled import CHUNK, TiledWeight

SIGN_BITS = 0x80008000 - (1 << 32)  # of the two halves of a word
MINUS_ONE = {torch.float16: 0xBC00BC00 - (1 << 32), torch.bfloat16: 0xBF80BF80 - (1 << 32)}
DECODE_WARPS = 4
ATTENTION_CHUNK = 512  # positions that one program attends to
ATTENTION_STEP = 16  # chunks that are put together at a time


def _groups(weight: TiledWeight) -> dict[str, Any]:
    return {"UNITS": 128 // weight.unit, "GROUP_UNITS": weight.group_units}


def _units(weight: TiledWeight, bits: int) -> Tensor:
    units = weight.units_of(bits)
    return weight.scales[bits] if units is None else units  # anything: it is not read


def _ceil(size: int, part: int) -> int:
    return -(-size // part)


def few_rows(x: Tensor, weight: TiledWeight, bits: int | Tensor, config: configs.FewRows | None = None) -> Tensor:
    """x [rows, K] -> [rows, N], at `bits` or row r at bits[r] (integers on x's device), each 8 or 16 rows at a time.

    A row whose bits have no scales becomes NaN: what they are is known on the device only.
    """
    rows, columns = x.shape
    mixed = isinstance(bits, Tensor)
    chosen = weight.bits if isinstance(bits, Tensor) else (bits,)
    config = config or configs.few_rows(weight, max(chosen), rows, mixed)
    y = x.new_empty(rows, weight.out_features)
    row_bits = bits if isinstance(bits, Tensor) else x  # anything: it is not read
    size = 8 if rows <= 8 else 16
    grid = (_ceil(weight.blocks, config.blocks), _ceil(rows, size))
    planes = weight.planes[: max(chosen)]
    scales = tuple(weight.scales[value] for value in chosen)
    shape: dict[str, Any] = {
        "CHUNKS": weight.chunks,
        "SCALES_BITS": chosen,
        "MIXED": mixed,
        "ROWS": size,
        "BLOCKS": config.blocks,
        "WARPS": config.warps,
        "num_warps": config.warps,
        "maxnreg": config.registers or None,
        "num_stages": 1,  # other warps hide the latency; staging in shared memory would undo the layout
    }
    if weight.kind == "codebook":
        few_rows_codebook[grid](
            x, planes, scales, row_bits, y,
            rows, weight.out_features, columns, weight.blocks, x.stride(0), row_bits.stride(0),
            **shape,
        )  # fmt: skip
        return y
    units = tuple(_units(weight, value) for value in chosen)
    few_rows_affine[grid](
        x, planes, scales, units, row_bits, y,
        rows, weight.out_features, columns, weight.blocks, weight.groups, weight.group,
        x.stride(0), row_bits.stride(0), SIGN_BITS,
        **shape, **_groups(weight), PADDED=weight.padded, MINUS_ONE=MINUS_ONE.get(x.dtype, MINUS_ONE[torch.bfloat16]),
    )  # fmt: skip
    return y


def decode(weight: TiledWeight, bits: int, dtype: torch.dtype, index: Tensor | None = None) -> Tensor:
    """The weight at `bits`, or its rows `index` (integers [n]): [N or n, K] in `dtype`, as the reference decodes."""
    count = weight.out_features if index is None else len(index)
    out = torch.empty(count, weight.in_features, dtype=dtype, device=weight.planes[0].device)
    if count == 0:
        return out
    grid = (_ceil(count, 8), _ceil(weight.chunks, DECODE_WARPS))
    decode_rows[grid](
        weight.planes[:bits], weight.scales[bits], _units(weight, bits), out if index is None else index, out,
        count, weight.out_features, weight.in_features, weight.chunks, weight.groups, weight.group,
        BITS=bits, CODEBOOK=weight.kind == "codebook", INDEXED=index is not None, **_groups(weight),
        PADDED=weight.padded, WARPS=DECODE_WARPS, num_warps=DECODE_WARPS,
    )  # fmt: skip
    return out


def in_register_order(x: Tensor, weight: TiledWeight) -> Tensor:
    """x [rows, K] -> [rows, chunks * 256], columns in the order in which `many_rows` decodes weights."""
    x = weight.spread(x).view(len(x), weight.chunks * 8, 4, 2, 2, 2)  # v c, t, sub, blk, half
    return x.permute(0, 1, 3, 4, 2, 5).reshape(len(x), weight.chunks * CHUNK)


def tiles(x: Tensor, weight: TiledWeight, bits: int, config: configs.ManyRows | None = None) -> Tensor:
    """x [rows, K], fp16 or bf16 -> [rows, N]: weights are decoded in registers, tile by tile."""
    rows = len(x)
    config = config or configs.many_rows(weight, bits, rows)
    y = x.new_empty(rows, weight.out_features)
    grid = (_ceil(weight.blocks, config.warps * config.blocks), _ceil(rows, config.rows))
    many_rows[grid](
        in_register_order(x, weight), weight.planes[:bits], weight.scales[bits], _units(weight, bits), y,
        rows, weight.out_features, weight.blocks, weight.groups,
        CHUNKS=weight.chunks, BITS=bits, CODEBOOK=weight.kind == "codebook", **_groups(weight),
        ROWS=config.rows, BLOCKS=config.blocks, WARPS=config.warps, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y


def append(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, starts: Tensor, lengths: Tensor) -> None:
    """As kernels.attention.append."""
    key, value = _rows_together(key), _rows_together(value)
    heads, rows, width = key.shape
    append_rows[(rows, heads)](
        key, value, keys, values, starts, lengths,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), keys.stride(0), values.stride(0),
        D=width, DV=value.shape[2], WIDTH=_power_of_two(max(width, value.shape[2])), num_warps=1,
    )  # fmt: skip


def attend(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, lengths: Tensor,
    longest: int, scale: float, window: int, softcap: float | None,
) -> Tensor:  # fmt: skip
    """As kernels.attention.attend; window 0: none."""
    query = _rows_together(query)
    heads, rows, width = query.shape
    key_heads, width_v = keys.shape[0], values.shape[2]
    chunks = _ceil(longest, ATTENTION_CHUNK)
    if window:
        chunks = min(chunks, _ceil(window - 1, ATTENTION_CHUNK) + 1)  # where it lies worst
    out = torch.empty(rows, heads, width_v, dtype=query.dtype, device=query.device)
    parts = sums = out  # anything: they are not used
    if chunks > 1:
        parts = torch.empty(rows, heads, chunks, width_v, dtype=torch.float32, device=query.device)
        sums = torch.empty(rows, heads, chunks, 2, dtype=torch.float32, device=query.device)
    widths: dict[str, Any] = {"DV": width_v, "WIDTH_V": max(16, _power_of_two(width_v))}
    small = keys.element_size() * max(width, width_v) > 256  # two tiles in registers and shared memory
    attend_chunk[(rows * key_heads, chunks)](
        query, keys, values, starts, lengths, out, parts, sums,
        query.stride(0), query.stride(1), keys.stride(0), values.stride(0), scale, softcap or 1.0,
        HEADS=key_heads, GROUPS=heads // key_heads, WINDOW=window, CAPPED=softcap is not None, ALONE=chunks == 1,
        D=width, WIDTH=max(16, _power_of_two(width)), **widths, ROWS=max(16, _power_of_two(heads // key_heads)),
        STEP=32 if small else 64, CHUNK=ATTENTION_CHUNK, num_warps=4, num_stages=2,
    )  # fmt: skip
    if chunks > 1:
        attend_whole[(rows, heads)](
            parts, sums, lengths, out, chunks,
            WINDOW=window, **widths, STEP=ATTENTION_STEP, CHUNK=ATTENTION_CHUNK, num_warps=4,
        )  # fmt: skip
    return out


def _rows_together(x: Tensor) -> Tensor:
    """x, its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
