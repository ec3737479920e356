"""Layers that read the same input run in one call.

A decoder block calls q, k and v with one tensor, and gate and up with another. The first of such a
group that is called computes all of them: the input is quantized once and one loop over threads
serves every weight. The others find their result waiting.

Results wait only for the very tensor they were computed from, unchanged, at the same bits, and are
dropped when they are taken. A group whose results go to waste, because the model does not call its
layers together, stops sharing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kernels import prepared_linear

if TYPE_CHECKING:
    from .linear import PlaneLinear

# names of sibling layers that the decoder blocks of transformers call with one input
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


class FusedGroup:
    """Sibling layers of equal in_features and groups."""

    def __init__(self, members: list[PlaneLinear]) -> None:
        self.members = members
        self._waiting: dict[int, Tensor] = {}
        self._input: Tensor | None = None
        self._version = 0
        self._bits = 0
        self._wasted = 0

    def can_share(self, x: Tensor) -> bool:
        """Whether sharing is safe for `x`: an ordinary eager tensor whose changes can be noticed."""
        return (
            self._wasted < 2
            and type(x) is Tensor
            and not torch.compiler.is_compiling()
            and not x.is_inference()
            and all(member.prepared is not None for member in self.members)
        )

    def output(self, layer: PlaneLinear, x: Tensor, bits: int) -> Tensor:
        """What `layer` makes of x at `bits`, and of its siblings for when they ask."""
        waiting = self._waiting
        if waiting:
            if x is self._input and x._version == self._version and bits == self._bits and id(layer) in waiting:
                y = waiting.pop(id(layer))
                if not waiting:
                    self._input, self._wasted = None, 0
                return y
            self._wasted += 1
        together = [member for member in self.members if member.bits_state.of(member.name) == bits]
        results = prepared_linear(x, [member.prepared for member in together if member.prepared is not None], bits)
        self._waiting = {id(member): y for member, y in zip(together, results, strict=True)}
        self._input, self._version, self._bits = x, x._version, bits
        return self._waiting.pop(id(layer))

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members}  # a copy starts with nothing waiting

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["members"])  # type: ignore[misc]


def fuse(model: nn.Module) -> int:
    """Let sibling layers of `model` that read the same input share calls; returns how many groups there are."""
    from .linear import PlaneLinear

    groups = 0
    for module in model.modules():
        for names in TOGETHER:
            members = [child for name in names if isinstance(child := getattr(module, name, None), PlaneLinear)]
            shapes = {(child.in_features, child.group_size, child.decoder, child.bits) for child in members}
            if len(members) > 1 and len(shapes) == 1:
                group = FusedGroup(members)
                for child in members:
                    child.fused = group
                groups += 1
    return groups
