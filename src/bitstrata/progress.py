"""Progress and messages of long work: a bar with an ETA on a terminal, one line a step otherwise.

Everything goes to stderr, so that stdout stays free for results.
"""

from __future__ import annotations

import re
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and line ends
MAX_LINES = 100  # a step is a line where there is no terminal; longer counts are thinned to this


def printable(text: str) -> str:
    """`text` for a terminal: names and values from files may hold characters that steer it, which are escaped."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class _Console(Console):
    """A console whose closed pipe silences it; the work it reports on goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Reporter:
    """Where a job says what it does. `quiet` silences messages and progress, not errors."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = _Console(stderr=True, highlight=False, soft_wrap=True)
        self.notes: list[str] = []

    def fresh(self) -> Reporter:
        """A reporter for another piece of work: the same terminal, no notes yet."""
        other = Reporter(quiet=self.quiet)
        other.console = self.console
        return other

    def note(self, message: str) -> None:
        """Say something the user did not ask for but must know; it also goes into the report."""
        self.notes.append(message)
        self.say(f"note: {message}")

    def say(self, message: str) -> None:
        if not self.quiet:
            self.console.print(printable(message), markup=False)

    def track(self, what: str, total: int, unit: str) -> Steps:
        """Count `total` steps of `what`; use as a context manager and call `step` after each."""
        return Steps(self, what, total, unit)


class Steps:
    """A running count with an ETA."""

    def __init__(self, reporter: Reporter, what: str, total: int, unit: str) -> None:
        self._reporter, self._what, self._total, self._unit = reporter, what, total, unit
        self._done = 0
        self._start = time.monotonic()
        self._measured = 0
        self._bar: Progress | None = None
        if sys.stderr.isatty() and not reporter.quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
                console=reporter.console,
                transient=True,
            )

    def __enter__(self) -> Steps:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=self._total, detail="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, detail: str = "", *, skipped: bool = False) -> None:
        """One step is done; `skipped` steps took no time and do not enter the estimate."""
        self._done += 1
        self._measured += not skipped
        if self._bar is not None:
            self._bar.update(self._task, advance=1, detail=detail)
        elif self._total <= MAX_LINES or self._done % -(-self._total // MAX_LINES) == 0 or self._done == self._total:
            self._reporter.say(f"{self._what}: {self._unit} {self._done}/{self._total} {detail} {self._eta()}".rstrip())

    def _eta(self) -> str:
        left = self._total - self._done
        if not left or not self._measured:
            return ""
        seconds = (time.monotonic() - self._start) / self._measured * left
        return f"eta {int(seconds // 60)}:{int(seconds % 60):02d}"
