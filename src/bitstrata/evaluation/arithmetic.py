"""In which arithmetic a model's products were computed while it was measured.

    exact   activations as they are
    int8    activations as a CPU's kernels make them, four scales for each group of columns

A kernel may compute calls of few rows in one and longer ones in the other (`Kernel.arithmetic`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..nn import PlaneLinear, multiplied_layers

ARITHMETICS = ("exact", "int8")


class Ran:
    """The products that the layers of a model were asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = multiplied_layers(model)
        self._arithmetics: set[str] = set()
        self._kernels: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what is asked inside."""
        handles = [layer.register_forward_pre_hook(self._note) for layer in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, layer: Any, arguments: tuple[Any, ...]) -> None:
        x = arguments[0]
        held = layer if isinstance(layer, PlaneLinear) else layer.embedding
        asked = None if held.bits_state is None else held.bits_state.arithmetic
        rows = x.shape[:-1].numel()
        kernel = held.packed.kernel_for(rows, x.dtype, asked)
        self._arithmetics.add(kernel.arithmetic(rows, x.dtype))
        self._kernels.add(kernel.name)

    def names(self) -> tuple[str, str]:
        """The arithmetic that ran, and the kernels; where there were several, all of their names."""
        return ", ".join(sorted(self._arithmetics)), ", ".join(sorted(self._kernels))
