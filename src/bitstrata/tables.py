"""Results as plain text: tables with numbers to the right, and numbers that may be missing."""

from __future__ import annotations

from collections.abc import Sequence


def optional(value: float | None, digits: int = 4) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}%"


def render(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A title over a table: the first column to the left, the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        return "   ".join([f"  {first.strip():<{widths[0]}}", *others]).rstrip()

    rule = " " + "─" * (sum(widths) + 3 * len(widths) - 1)
    return "\n".join([f"{title}\n", line(columns), rule, *map(line, rows)])
