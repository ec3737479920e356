"""Who runs a model at what, now.

A model's layers read one assignment, so two threads inside one model must agree on it. Every call and every block
says here what it runs at. One that would change that under another thread is refused before it changes anything,
and what one leaves behind when it ends is what the calls that are still under way run at.

Of these uses, steps are single forward passes. Weights are exchanged between steps: a step sees the weights of one plan
from its first layer to its last, and nobody waits for longer than a step.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from .bits import Assignment


@dataclass(eq=False)
class Use:
    """A call or a block of one thread, and what it runs at."""

    assignment: Assignment
    arithmetic: str | None = None
    is_step: bool = False
    thread: int = field(default_factory=threading.get_ident)

    def __str__(self) -> str:
        given = self.assignment.given
        if isinstance(given, int):
            said = f"bits={given}"
        else:
            said = "a plan" if isinstance(given, Mapping) else "bits of each row"
        return said if self.arithmetic is None else f"{said} in {self.arithmetic} arithmetic"


class Uses:
    """The uses of one model that are under way, the latest last. Everything but `changing` is called inside `lock`."""

    def __init__(self) -> None:
        self.lock = threading.Condition(threading.RLock())  # collecting garbage in here may end an abandoned use
        self._open: list[Use] = []
        self._is_changing = False

    def enter(self, use: Use) -> None:
        """Begin `use`. Raises UsageError as `require_agreement`."""
        self.require_agreement(use)
        self._open.append(use)

    def leave(self, use: Use) -> Use | None:
        """End `use`; the one that counts from now on, None if there is none."""
        self._open.remove(use)
        if use.is_step:
            self.lock.notify_all()
        return self._open[-1] if self._open else None

    def innermost(self) -> Use | None:
        """The calling thread's latest use."""
        thread = threading.get_ident()
        return next((use for use in reversed(self._open) if use.thread == thread), None)

    def require_agreement(self, use: Use) -> None:
        """Raise UsageError while another thread runs the model at something else."""
        for other in self._open:
            same = other.arithmetic == use.arithmetic and other.assignment.agrees(use.assignment)
            if other.thread != use.thread and not same:
                raise UsageError(
                    f"another thread is running this model at {other}: it cannot run at {use} too",
                    hint="one thread after the other; or a copy.deepcopy of the model for each thread; "
                    "or one batch with bits for each row",
                )

    def _is_inside(self) -> bool:
        """Whether the calling thread is in a step."""
        thread = threading.get_ident()
        return any(use.is_step and use.thread == thread for use in self._open)

    def wait_for_change(self) -> None:
        """Wait for a change that has begun to wait before; within a step there is none."""
        if self._is_changing and not self._is_inside():
            self.lock.wait_for(lambda: not self._is_changing)

    def check_outside(self) -> None:
        """Raise UsageError where the caller is in a step: a change would wait for itself."""
        with self.lock:
            if self._is_inside():
                raise UsageError("a model cannot be resized from inside its own forward pass")

    @contextmanager
    def changing(self) -> Iterator[None]:
        """No step is under way inside. Raises UsageError as `check_outside`."""
        self.check_outside()
        with self.lock:
            self.lock.wait_for(lambda: not self._is_changing)
            self._is_changing = True
            try:
                self.lock.wait_for(lambda: not any(use.is_step for use in self._open))
            except BaseException:
                self._end_change()
                raise
        try:
            yield
        finally:
            with self.lock:
                self._end_change()

    def _end_change(self) -> None:
        self._is_changing = False
        self.lock.notify_all()

    def __getstate__(self) -> dict[str, object]:
        return {}  # nobody runs a copy yet

    def __setstate__(self, state: object) -> None:
        self.__init__()  # type: ignore[misc]
