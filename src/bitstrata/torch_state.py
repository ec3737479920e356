"""What a caller may have set in torch, set aside while a verb runs.

Results must not depend on it, and training needs some of it: gradients are recorded, tensors are ordinary ones (no
inference mode), nothing is cast (no autocast), new tensors are float32 on the CPU unless they say otherwise, and a
float32 product is one. All of it is as it was when the verb has ended, an error included.

Left alone: deterministic algorithms, which ask for the results that a verb gives anyway or for an error; threads;
random generators.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

DEVICES = ("cpu", "cuda")  # where a verb may run


class _OfTheProcess:
    """What belongs to the process and not to a thread: verbs that overlap in several threads share one change of it.

    The first to begin sets it aside, the last to end puts it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: contextlib.ExitStack | None = None

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._before = _plain_products_and_dtype()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside and self._before is not None:
                    self._before.close()


def _plain_products_and_dtype() -> contextlib.ExitStack:
    """Make float32 the default and its products exact; closing the result undoes that."""
    undo = contextlib.ExitStack()
    for backend in (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul):  # type: ignore[attr-defined]
        if backend.fp32_precision not in ("none", "ieee"):
            undo.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
            backend.fp32_precision = "ieee"
    if torch.get_default_dtype() != torch.float32:
        undo.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
    return undo


_PROCESS = _OfTheProcess()


@contextlib.contextmanager
def ordinary_torch() -> Iterator[None]:
    """The parts of torch's state that are listed above as when it has just been imported; also a decorator.

    The default dtype and the precision of products belong to the process, the rest to this thread.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in DEVICES:
            stack.callback(torch.set_autocast_enabled, device, torch.is_autocast_enabled(device))
            torch.set_autocast_enabled(device, False)
        stack.enter_context(_PROCESS.set_aside())
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))  # slows every call down, so only where it is needed
        yield
