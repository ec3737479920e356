"""A kernel is checked before it is timed: a speed of wrong results is not reported."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckError
from ..kernels import Weight
from ..planes import PlaneWeight, decode

ROWS_CHECKED = 256
# Relative RMS error allowed: int8 activations and byte levels make about one percent; the rest is rounding.
INT8_LIMIT = 0.02
EXACT_LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def verify(x: Tensor, stored: PlaneWeight, weight: Weight, bits: int | Tensor) -> float:
    """The relative RMS error of the kernel at `bits` against float64, on the first and the last output rows.

    x [rows, K]; bits for all rows, or one a row. Raises CheckError if it is beyond what the kernel may do.
    """
    y = weight.linear(x, bits).double()
    last = stored.out_features
    spans = [(0, min(ROWS_CHECKED, last)), (max(0, last - ROWS_CHECKED), last)]
    columns = torch.cat([torch.arange(*span, device=x.device) for span in spans])
    expected = y.new_empty(len(x), len(columns))
    for value in bits.unique().tolist() if isinstance(bits, Tensor) else [bits]:
        exact = torch.cat([decode(stored.outputs(*span), value, torch.float64) for span in spans])
        chosen = bits == value if isinstance(bits, Tensor) else slice(None)
        expected[chosen] = x[chosen].double() @ exact.T
    error = float((y[:, columns] - expected).norm() / expected.norm())
    kernel = weight.kernel_for(x.shape[0], x.dtype)
    limit = max(INT8_LIMIT if kernel.activations == "int8" else 0.0, EXACT_LIMIT[x.dtype])
    if not error <= limit:
        what = "mixed" if isinstance(bits, Tensor) else bits
        raise CheckError(
            f"kernel {kernel.name} is wrong at {what} bits, {x.shape[0]} rows, [{last}, {x.shape[1]}]: "
            f"relative error {error:.2g}, allowed {limit:.2g}",
            hint="nothing is reported; please report this with the output of `bitstrata env`",
        )
    return error
