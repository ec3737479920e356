"""Who runs a model at what, now.

A model's layers read one value, so two threads inside one model must agree on it. Every call and every block
says here what it runs at. One that would change that under another thread is refused before it changes anything,
and what one leaves behind when it ends is what the calls that are still under way run at.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError


@dataclass(eq=False)
class Use:
    """A call or a block of thread `thread`. bits and arithmetic: what it runs at."""

    thread: int
    bits: Any
    arithmetic: str | None

    def agrees(self, other: Use) -> bool:
        return self.arithmetic == other.arithmetic and _equal(self.bits, other.bits)


class Uses:
    """The uses of one model that are under way, the latest last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[Use] = []

    def enter(self, use: Use, change: Callable[[], None]) -> None:
        """Begin `use`; `change` makes it what the model runs at. Raises UsageError as `_require_agreement`."""
        with self._lock:
            self._require_agreement(use)
            self._open.append(use)
            change()

    def leave(self, use: Use, change: Callable[[Use | None], None]) -> None:
        """End `use`; `change` gets the use that counts from now on, None if there is none."""
        with self._lock:
            self._open.remove(use)
            change(self._open[-1] if self._open else None)

    def turn(self, use: Use, change: Callable[[bool], None]) -> None:
        """The calling thread's innermost use goes on at the bits of `use`; `change` is told whether it has one.

        Raises UsageError as `_require_agreement`.
        """
        with self._lock:
            self._require_agreement(use)
            mine = [other for other in self._open if other.thread == use.thread]
            if mine:
                mine[-1].bits = use.bits
            change(bool(mine))

    def _require_agreement(self, use: Use) -> None:
        """Raise UsageError while another thread runs the model at something else; nothing has changed then."""
        for other in self._open:
            if other.thread != use.thread and not other.agrees(use):
                raise UsageError(
                    f"another thread is running this model at {_said(other)}: it cannot run at {_said(use)} too",
                    hint="one thread after the other; or a copy.deepcopy of the model for each thread; "
                    "or one batch with bits for each row",
                )

    def __getstate__(self) -> dict[str, object]:
        return {}  # nobody runs a copy yet

    def __setstate__(self, state: object) -> None:
        self.__init__()  # type: ignore[misc]


def here(bits: Any, arithmetic: str | None) -> Use:
    """A use of the calling thread."""
    return Use(threading.get_ident(), bits, arithmetic)


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    plain = (int, Mapping)
    return isinstance(one, plain) and isinstance(other, plain) and one == other


def _said(use: Use) -> str:
    bits = use.bits
    if isinstance(bits, int):
        said = f"bits={bits}"
    else:
        said = "a plan" if isinstance(bits, Mapping) else "bits of each row"
    return said if use.arithmetic is None else f"{said} in {use.arithmetic} arithmetic"
