"""The bits of a model of which only one plan's pages are in memory.

Such a model runs that plan and nothing else. A resize exchanges weights and plan between two steps: a step,
one forward pass of the model, sees one plan from its first layer to its last, and nobody waits for longer
than a step.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from ..errors import UnsupportedBitsError, UsageError
from ..planes.weights import whole_number
from .bits import Bits, BitsState, Precision, RowBits


class ResidentPlan(Mapping[str, int]):
    """Layer name -> the bits that are in memory now; a resize changes them under whoever holds it."""

    def __init__(self) -> None:
        self._bits: dict[str, int] = {}
        self._name = "plan"

    def __getitem__(self, layer: str) -> int:
        return self._bits[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def __str__(self) -> str:
        return self._name

    def __repr__(self) -> str:
        return f"ResidentPlan({self._bits})"


class Steps:
    """Any number of steps at a time, or one change."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: Counter[int] = Counter()  # thread -> steps that it is in, one inside the other
        self._changing = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Everything inside sees no change. Waits for one that has begun to wait before."""
        me = threading.get_ident()
        with self._changed:
            if me not in self._inside:
                self._changed.wait_for(lambda: not self._changing)
            self._inside[me] += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside[me] -= 1
                if not self._inside[me]:
                    del self._inside[me]
                    self._changed.notify_all()

    def check_outside(self) -> None:
        """Raise UsageError where the caller is in a step: it would wait for itself."""
        if threading.get_ident() in self._inside:
            raise UsageError("a model cannot be resized from inside its own forward pass")

    @contextmanager
    def change(self) -> Iterator[None]:
        """No step is under way inside. Raises UsageError where the caller itself is in one."""
        self.check_outside()
        with self._changed:
            self._changed.wait_for(lambda: not self._changing)
            self._changing = True
            try:
                self._changed.wait_for(lambda: not self._inside)
            except BaseException:
                self._changing = False
                self._changed.notify_all()
                raise
        try:
            yield
        finally:
            with self._changed:
                self._changing = False
                self._changed.notify_all()

    def __getstate__(self) -> dict[str, object]:
        return {}  # nobody is in the steps of a copy

    def __setstate__(self, state: object) -> None:
        self.__init__()  # type: ignore[misc]


class ResidentState(BitsState):
    """The BitsState of such a model: always at the plan in memory. Other bits are refused, not approximated.

    Args:
        layers: for each quantized layer the bits that the file has.
    """

    def __init__(self, layers: Mapping[str, tuple[int, ...]]) -> None:
        self.layers = dict(layers)
        self.plan = ResidentPlan()
        self.steps = Steps()
        self._begin()

    @property
    def value(self) -> Bits:  # type: ignore[override]
        """The plan in memory, live."""
        return self.plan

    @value.setter
    def value(self, value: Bits) -> None:
        """What a use puts in place is the plan in memory, and was before."""

    @property
    def default(self) -> Precision:
        return self.plan

    def keep(self, value: Precision | None) -> Precision:
        """The live plan: whoever keeps it goes along with every resize."""
        if value is not None:
            self.check(value)
        return self.plan

    def still(self) -> AbstractContextManager[None]:
        return nullcontext() if torch.compiler.is_compiling() else self.steps.step()

    @property
    def supported(self) -> tuple[int, ...]:  # type: ignore[override]
        """The uniform bits that can run: those of a plan that is uniform, else none."""
        values = set(self.plan.values())
        return tuple(values) if len(values) == 1 else ()

    def adopt(self, plan: Mapping[str, int], name: str = "plan") -> None:
        """`plan`, of this name, is what is in memory from now on."""
        self.plan._bits, self.plan._name = dict(plan), name

    def of(self, layer: str) -> int | Tensor:
        return self.plan[layer]

    def check(self, value: Bits) -> Bits:
        """The live plan, if `value` is what is in memory: whoever asked for it goes along with later resizes."""
        if value is self.plan:
            return self.plan
        if isinstance(value, RowBits):
            for choice in value.choices:
                self.check(choice)
            return self.plan
        if isinstance(value, Tensor) and value.dim():
            asked = set(super().check(value).unique().tolist())  # type: ignore[union-attr]
            if asked <= set(self.supported):
                return self.plan
            raise self._refusal(sorted(asked))
        if isinstance(value, Mapping):
            if dict(self._check_plan(value)) == dict(self.plan):
                return self.plan
            raise UsageError(
                f"the plan {getattr(value, 'name', '')} is not the one in memory".replace("  ", " "),
                hint="model.resize(plan) reads and drops what differs; without `bits` the model runs what is in memory",
            )
        whole = whole_number(value)
        if whole is None:
            return super().check(value)
        if whole in self.supported:
            return self.plan
        raise self._refusal(whole)

    def _refusal(self, asked: object) -> UnsupportedBitsError:
        bits = sorted(set(self.plan.values()))
        held = f"{bits[0]} bits a layer" if len(bits) == 1 else f"a plan of {bits[0]} to {bits[-1]} bits a layer"
        error = UnsupportedBitsError(asked, bits, where=f"this model: in memory is {held} and nothing else")
        resize = f"model.resize({asked})" if isinstance(asked, int) else "model.resize"
        error.hint = f"leave bits out to run what is in memory, or call {resize}"
        return error
