"""What is drawn: what the package logs, on stderr, as a bar with an ETA on a terminal and as one line a step otherwise;
a chat's remarks; texts side by side. Colours are for terminals, and off where NO_COLOR is set.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from ..progress import Progress, log

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and line ends


def printable(text: str) -> str:
    """`text` for a terminal: names and values from files may hold characters that steer it, which are escaped."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class _Console(Console):
    """A console whose closed pipe silences it; the work it reports on goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Terminal(logging.Handler):
    """Shows records on stderr; results go to stdout."""

    def __init__(self) -> None:
        super().__init__()
        self._console = _Console(stderr=True, highlight=False, soft_wrap=True)
        self._bars: Bars | None = None
        self._tasks: dict[int, TaskID] = {}

    def emit(self, record: logging.LogRecord) -> None:
        progress = getattr(record, "progress", None)
        if isinstance(progress, Progress) and sys.stderr.isatty():
            self._draw(progress)
        elif record.levelno >= logging.INFO:
            note = "note: " if record.levelno == logging.WARNING else ""
            self._console.print(note + printable(self.format(record)), markup=False)

    def _draw(self, progress: Progress) -> None:
        if self._bars is None:
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
                console=self._console,
                transient=True,
            )
            self._bars.start()
        if progress.key not in self._tasks:
            self._tasks[progress.key] = self._bars.add_task(progress.what, total=progress.total, detail="")
        task = self._tasks[progress.key]
        if not progress.ended:
            self._bars.update(task, completed=progress.done, detail=progress.detail)
            return
        self._bars.remove_task(task)
        del self._tasks[progress.key]
        if not self._tasks:
            self._bars.stop()
            self._bars = None


@contextmanager
def shown_on_stderr() -> Iterator[None]:
    """While this lasts, what the package logs is shown."""
    handler, level = Terminal(), log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)  # steps between two lines move the bar
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)


def remark(text: str) -> None:
    """`text` on stderr, beside what is said on stdout."""
    _Console(stderr=True, highlight=False, soft_wrap=True).print(printable(text), style="dim", markup=False)


def side_by_side(columns: Sequence[tuple[str, str]]) -> None:
    """Texts next to each other on stdout, each under its heading; marked from where they are no longer the same."""
    texts = [text for _, text in columns]
    differing = (place for place, found in enumerate(zip(*texts, strict=False)) if len(set(found)) > 1)
    same = next(differing, min(map(len, texts)))
    table = Table(box=None, expand=True, padding=(0, 2, 0, 0), header_style="bold")
    for heading, _ in columns:
        table.add_column(Text(printable(heading)), ratio=1, overflow="fold")
    table.add_row(*(Text.assemble(printable(text[:same]), (printable(text[same:]), "yellow")) for text in texts))
    _Console(highlight=False).print(table)
