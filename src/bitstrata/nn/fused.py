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
from torch import Tensor, nn

from ..kernels import PreparedWeight, is_plain, prepared_linear

if TYPE_CHECKING:
    from .linear import PlaneLinear

# names of sibling layers that the decoder blocks of transformers call with one input
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


WASTED = 2  # rounds without a taker for some result, after which a group stops sharing


class _Round:
    """What one input gave: the results that siblings have not taken yet."""

    def __init__(self, x: Tensor) -> None:
        self.input = x
        self._before = x.clone() if x.is_inference() else x._version
        self.results: dict[int, tuple[PreparedWeight, int, Tensor]] = {}

    def is_of(self, x: Tensor) -> bool:
        """Whether `x` is the input, as it was when this began."""
        if x is not self.input:
            return False
        if isinstance(self._before, Tensor):
            return x.shape == self._before.shape and torch.equal(_as_integers(x), _as_integers(self._before))
        return x._version == self._before

    def take(self, layer: PlaneLinear, bits: int) -> Tensor | None:
        prepared, at, y = self.results.pop(id(layer))
        return y if prepared is layer.prepared and at == bits else None


class FusedGroup:
    """Sibling layers of equal in_features and groups."""

    def __init__(self, members: list[PlaneLinear]) -> None:
        self.members = members
        self._rounds: list[_Round] = []  # at most one; a list, because its pop and its replacement are atomic
        self._wasted = 0

    def can_share(self, x: Tensor) -> bool:
        """Whether sharing is safe for `x`: an ordinary eager tensor whose changes can be noticed."""
        return (
            self._wasted < WASTED
            and is_plain(x)
            and (x.device.type == "cpu" or not x.is_inference())  # elsewhere a comparison would wait for the device
            and all(member.prepared is not None for member in self.members)
        )

    def output(self, layer: PlaneLinear, x: Tensor, bits: int) -> Tensor:
        """What `layer` makes of x at `bits`, and of its siblings at these bits for when they ask."""
        try:
            current: _Round | None = self._rounds.pop()
        except IndexError:
            current = None
        if current is not None and not current.is_of(x):
            current, self._wasted = None, self._wasted + 1
        y = None
        if current is not None and id(layer) in current.results:
            y = current.take(layer, bits)
            if not current.results:
                current, self._wasted = None, 0
        if y is None:
            if current is None:
                current = _Round(x)
            y = self._compute(current, layer, bits)
        if current is not None and current.results:
            self._rounds = [current]
        return y

    def _compute(self, current: _Round, layer: PlaneLinear, bits: int) -> Tensor:
        together = [layer]
        if self._wasted < WASTED:
            others = [m for m in self.members if m is not layer and id(m) not in current.results]
            shape = current.input.shape[:-1]
            together += [member for member in others if _is_at(member, bits, shape)]
        weights = [member.prepared for member in together if member.prepared is not None]
        y, *more = prepared_linear(current.input, weights, bits)
        for member, weight, result in zip(together[1:], weights[1:], more, strict=True):
            current.results[id(member)] = (weight, bits, result)
        return y

    def forget(self) -> None:
        """Drop results that wait, and the weights they were computed with."""
        self._rounds = []

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members}  # a copy starts with nothing waiting

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["members"])  # type: ignore[misc]


def _as_integers(x: Tensor) -> Tensor:
    """The bits of x, so that NaN is equal to itself."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _is_at(member: PlaneLinear, bits: int, shape: torch.Size) -> bool:
    """Whether `member` runs at `bits` in all rows, which are `shape`."""
    now = member.bits_state.bits_for(member.name, shape)
    return isinstance(now, int) and now == bits


def fuse(model: nn.Module) -> int:
    """Let sibling layers of `model` that read the same input share calls; returns how many groups there are."""
    from .linear import PlaneLinear

    groups = 0
    for module in model.modules():
        for names in TOGETHER:
            members = [child for name in names if isinstance(child := getattr(module, name, None), PlaneLinear)]
            shapes = {(child.in_features, child.group_size, child.kind, child.bits) for child in members}
            if len(members) > 1 and len(shapes) == 1:
                group = FusedGroup(members)
                for child in members:
                    child.fused = group
                groups += 1
    return groups
