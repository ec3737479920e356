"""Attention of one new token a row, over a cache in which each row has a contiguous range: what a graph step runs.

    keys, values    [Hkv, tokens, D], [Hkv, tokens, D']: the cache of a layer
    starts, lengths int64 [rows], on the device: a row's tokens are at starts[r] .. starts[r] + lengths[r] - 1, the new
                    one the last of them; length 0: padding, for which nothing is written and the result is 0

No shape depends on a length and nothing waits for the device, so one CUDA graph serves all that the two tensors hold.
Heads that share keys are consecutive. `append` and `attend` launch Triton kernels; their `_reference` twins are
the same in plain torch, slow, for tests.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor


def reason(dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on a CUDA device, with a cache of `dtype`; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'bitstrata[triton]')"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"keys and values are {dtype}"
    return None


def append(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, starts: Tensor, lengths: Tensor) -> None:
    """Put key [Hkv, rows, D] and value [Hkv, rows, D'], any strides, to the rows' last places."""
    from .triton import launch

    launch.append(keys, values, key, value, starts, lengths)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    longest: int,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scores) v of the positions that each row's last token sees: query [H, rows, D] -> [rows, H, D'].

    Args:
        longest: no length is more.
        scale: of q k^T; D ** -0.5 by default.
        window: the last positions that are seen; all by default.
        softcap: scores s become softcap * tanh(s / softcap).
    """
    from .triton import launch

    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return launch.attend(query, keys, values, starts, lengths, longest, scale, window or 0, softcap)


def append_reference(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, starts: Tensor, lengths: Tensor) -> None:
    """As `append`."""
    rows = torch.arange(len(starts), device=starts.device)
    for held, new in ((keys, key), (values, value)):
        places = torch.arange(held.shape[1], device=starts.device)
        chosen = (places == (starts + lengths - 1)[:, None]) & (lengths > 0)[:, None]  # [rows, tokens]
        row = torch.where(chosen, rows[:, None], -1).amax(0)  # whose token a place gets, -1: nobody's
        held.copy_(torch.where((row >= 0)[:, None], new[:, row.clamp_min(0)], held))


def attend_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    longest: int,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """As `attend`, over the whole cache with a mask."""
    heads, _, width = query.shape
    places = torch.arange(keys.shape[1], device=starts.device)
    end = (starts + lengths)[:, None]
    first = starts[:, None] if window is None else torch.maximum(starts[:, None], end - window)
    seen = (places >= first) & (places < end)  # [rows, tokens]
    used = seen.any(0)[:, None]  # what is in no range may be anything
    k, v = (torch.where(used, held, 0).repeat_interleave(heads // len(held), 0) for held in (keys, values))
    scores = query @ k.transpose(1, 2) * (width**-0.5 if scale is None else scale)  # [H, rows, tokens]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
    weights = torch.where(seen, weights, 0)  # a row that sees nothing has NaN
    return (weights @ v).transpose(0, 1)
