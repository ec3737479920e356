"""In which arithmetic a model's products were computed while it was measured.

    exact   activations as they are
    int8    activations as a decoding step on a CPU makes them, four scales for each group of columns

A kernel may compute calls of few rows in one and longer ones in the other (`Kernel.arithmetic`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..kernels import Problem, select, select_in
from ..nn import PlaneLinear, multiplied_layers

ARITHMETICS = ("exact", "int8")


class Ran:
    """The products that the layers of a model were asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = multiplied_layers(model)
        self._problems: set[Problem] = set()

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
        self._problems.add(Problem(x.device.type, x.dtype, x.numel() // x.shape[-1], held.kind))

    def with_arithmetic(self, asked: str | None) -> tuple[str, str]:
        """The arithmetic that ran, and the kernels; where there were several, all of their names.

        asked: what the model was told to compute in, None for nothing.
        """
        arithmetics, kernels = set(), set()
        for problem in self._problems:
            kernel = select(problem) if asked is None else select_in(problem, asked)
            arithmetics.add(kernel.arithmetic(problem.rows))
            kernels.add(kernel.name)
        return ", ".join(sorted(arithmetics)), ", ".join(sorted(kernels))
