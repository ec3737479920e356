"""Layers that read the same input run in one call.

A decoder block calls q, k and v with one tensor, and gate and up with another. The first of such a
group that is called computes all of them: the input is quantized once and one loop over threads
serves every weight. The others find their result waiting.

Results wait only for the very tensor they were computed from, unchanged, at the same bits, and are
dropped when they are taken. Whether it is unchanged its version says; tensors of `torch.inference_mode` have none,
so there a copy is kept and compared. A group whose results go to waste, because the model does not call its
layers together, stops sharing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels import Weight, linear_many

if TYPE_CHECKING:
    from .linear import PlaneLinear

# names of sibling layers that the decoder blocks of transformers call with one input
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


WASTED = 2  # rounds without a taker for some result, after which a group stops sharing


class _Round:
    """What one input gave at some bits: the results that siblings have not taken yet, and what made them."""

    def __init__(self, x: Tensor, bits: int | Tensor) -> None:
        self.input, self.bits = x, bits
        self._before = x.clone() if x.is_inference() else x._version
        self.results: dict[int, tuple[Weight, Tensor]] = {}

    def is_of(self, x: Tensor) -> bool:
        """Whether `x` is the input, as it was when this began."""
        if x is not self.input:
            return False
        if isinstance(self._before, Tensor):
            return x.shape == self._before.shape and torch.equal(_as_integers(x), _as_integers(self._before))
        return x._version == self._before


class FusedGroup:
    """Sibling layers of equal in_features and groups."""

    def __init__(self, members: list[PlaneLinear]) -> None:
        self.members = members
        self._rounds: list[_Round] = []  # at most one; a list, because its pop and its replacement are atomic
        self._wasted = 0

    def linear(self, layer: PlaneLinear, x: Tensor, bits: int | Tensor) -> Tensor:
        """What `layer` makes of x, a plain tensor, at `bits`, and of its siblings at these bits for when they ask."""
        try:
            current: _Round | None = self._rounds.pop()
        except IndexError:
            current = None
        if current is not None and not current.is_of(x):
            current, self._wasted = None, self._wasted + 1
        if current is None:
            return self._begin(layer, x, bits)
        weight, y = current.results.pop(id(layer), (None, None))
        if current.results:
            self._rounds = [current]
        else:
            self._wasted = 0
        fits = weight is layer.packed and _equal(current.bits, bits)
        return y if y is not None and fits else layer.packed.linear(x, bits)

    def _begin(self, layer: PlaneLinear, x: Tensor, bits: int | Tensor) -> Tensor:
        weight, others = layer.packed, []
        # elsewhere than on a CPU the comparison of a tensor without a version would wait for the device
        if self._wasted < WASTED and (x.device.type == "cpu" or not x.is_inference()):
            others = [
                (member, member.packed)
                for member in self.members
                if member is not layer and _equal(member.bits_state.bits_for(member.name, x.shape[:-1], x.device), bits)
            ]
        others = [(member, other) for member, other in others if other.kernel.name == weight.kernel.name]
        if not others:
            return weight.linear(x, bits)
        y, *more = linear_many(x, [weight, *(other for _, other in others)], bits)
        current = _Round(x, bits)
        for (member, other), result in zip(others, more, strict=True):
            current.results[id(member)] = other, result
        self._rounds = [current]
        return y

    def clear(self) -> None:
        """Drop results that wait, and the weights they were computed with."""
        self._rounds = []

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members}  # a copy starts with nothing waiting

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["members"])  # type: ignore[misc]


def _as_integers(x: Tensor) -> Tensor:
    """The bits of x, so that NaN is equal to itself."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _equal(one: int | Tensor, other: int | Tensor) -> bool:
    """Whether these are the same bits; those of rows are one tensor for all layers that have the same."""
    return one is other or (not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other)
