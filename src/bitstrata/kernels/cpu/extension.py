"""The native extension, if it is there.

It is built when the package is installed. Without a compiler the package installs all the same; the
reference kernel then runs, and says so once.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

native: ModuleType | None
try:
    from . import _native as _extension
except ImportError as error:
    native, missing = None, f"the native extension is not there ({error})"
else:
    native, missing = _extension, ""


def choose_codes(
    bits: Sequence[int],
    levels: Sequence[Tensor],
    left: Sequence[Tensor],
    factors: Sequence[Tensor],
    weights: Sequence[Tensor],
    codes: Tensor,
    *,
    given: bool,
) -> bool:
    """The column loop of solvers/joint.py in native code; False, and nothing done, where that cannot run.

    Args:
        bits: of each track, ascending.
        levels: fp32 [2^p, N] each; left: fp32 [g, N], is not changed; factors: fp32 [g, g]; weights: fp32 [g].
        codes: int64 [g, N], receives the codes; starts from those it holds if `given`.
    """
    if native is None or codes.device.type != "cpu":
        return False
    columns, rows = codes.shape
    assert codes.is_contiguous()
    assert codes.dtype == torch.int64
    kept = []  # contiguous copies live until the call is over
    for value, *tensors in zip(bits, levels, left, factors, weights, strict=True):
        shapes = ((2**value, rows), (columns, rows), (columns, columns), (columns,))
        for tensor, shape in zip(tensors, shapes, strict=True):
            assert tensor.shape == shape
            assert tensor.dtype == torch.float32
        kept.append((value, [tensor.contiguous() for tensor in tensors]))
    tracks = [(value, *(tensor.data_ptr() for tensor in tensors)) for value, tensors in kept]
    native.choose_codes(rows, columns, tracks, codes.data_ptr(), given, torch.get_num_threads())
    return True


def fit_codes(code: Tensor, bits: int, metric: Tensor, residual: Tensor, ridge: float) -> Tensor | None:
    """`least_squares_step` of solvers/joint.py in native code, fp32 [bits + 1, N]; None where that cannot run.

    The result is the same for any number of threads.

    Args:
        code: int64 [g, N], of `bits`.
        metric: fp32 [g, g], symmetric; residual: fp32 [g, N].
        ridge: added to the diagonal of each row's normal matrix, as a share of its mean.
    """
    if native is None or code.device.type != "cpu":
        return None
    columns, rows = code.shape
    code, metric, residual = code.contiguous(), metric.contiguous(), residual.contiguous()
    assert code.dtype == torch.int64
    assert metric.dtype == residual.dtype == torch.float32
    assert metric.shape == (columns, columns)
    assert residual.shape == (columns, rows)
    step = torch.empty(bits + 1, rows)
    places = code.data_ptr(), metric.data_ptr(), residual.data_ptr()
    native.fit_codes(rows, columns, bits, *places, ridge, step.data_ptr(), torch.get_num_threads())
    return step


def gram_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `add_gram` can run for such matrices."""
    return native is not None and device.type == "cpu" and dtype == torch.bfloat16 and bool(native.gram_runs())


def add_gram(total: Tensor, x: Tensor, y: Tensor, *, upper: bool = False) -> bool:
    """total += x^T y in native code, bf16 products and fp32 sums; False, and nothing done, where that cannot run.

    The result is the same for any number of threads.

    Args:
        total: fp32 [Kx, Ky], contiguous; x: bf16 [n, Kx]; y: bf16 [n, Ky].
        upper: below the diagonal nothing, or only a part, is added.
    """
    if native is None or not all(gram_runs(one.device, one.dtype) for one in (x, y)):
        return False
    assert total.is_contiguous()
    assert total.dtype == torch.float32
    assert total.shape == (x.shape[1], y.shape[1])
    assert len(x) == len(y)
    x, y = x.contiguous(), y.contiguous()
    native.add_gram(x.data_ptr(), y.data_ptr(), total.data_ptr(), len(x), *total.shape, upper, torch.get_num_threads())
    return True


def read_all(buffer: Tensor, threads: int) -> None:
    """Read every byte of a contiguous CPU tensor once: the yardstick for kernels that are bound by memory."""
    if native is None:
        buffer.sum()
    else:
        native.read_all(buffer.data_ptr(), buffer.nbytes, threads)
