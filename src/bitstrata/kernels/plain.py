"""Whether a call may go past torch's dispatcher, straight to a kernel that reads and writes memory by address.

A model's decoding step makes hundreds of calls, and the dispatcher costs as much as a small product. But it is also
what records, transforms and differentiates: whoever does one of these must see an op, and here is the one place that
says who they are.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..errors import UsageError


def is_plain(x: Tensor, *more: Tensor) -> bool:
    """Whether nobody wants to see what is done with these tensors, and their memory holds their values.

    False while a compiler, an exporter or a tracer looks on (torch.compile, torch.export, torch.jit.trace, make_fx),
    inside the transforms of torch.func, where a gradient or a tangent may be wanted, under a dispatch or function mode,
    and for subclasses of Tensor and values that
    are not there (meta) or that torch has not written yet (lazy negation, lazy zeros).
    """
    return (
        not torch.compiler.is_compiling()  # before what a compiler could not follow
        and not is_in_torch_dispatch_mode()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and (not torch._C._is_torch_function_mode_enabled() or _only_devices())
        and _is_ordinary(x)
        and (not more or all(map(_is_ordinary, more)))
    )


def _is_ordinary(x: Tensor) -> bool:
    return (
        type(x) is Tensor
        and not x.is_meta
        and not (x.requires_grad and torch.is_grad_enabled())
        and not x.is_neg()
        and not x._is_zerotensor()
    )


def _only_devices() -> bool:
    """Whether all function modes only choose where new tensors are made: a default device is such a mode."""
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def check_constant(scales: Iterable[Tensor]) -> None:
    """Raise UsageError if somebody waits for derivatives with respect to a weight's own numbers: there are none."""
    backward, forward = torch.is_grad_enabled(), forward_ad._current_level >= 0
    for tensor in scales:
        if (backward and tensor.requires_grad) or (forward and forward_ad.unpack_dual(tensor).tangent is not None):
            raise UsageError(
                "derivatives with respect to the scales, offsets or tables of a quantized weight are not computed",
                hint="detach them; `bitstrata quantize --preset best` tunes them",
            )
