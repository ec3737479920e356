"""Texts from a column of a table: CSV as spreadsheets and data sets have it, its first line names the columns."""

from __future__ import annotations

import csv
from io import StringIO
from pathlib import Path

from ..errors import TextError, first_line

COLUMN = "text"


def column_of_texts(path: Path, content: str) -> list[str]:
    """What the column `text` of `content`, or its only column, says in each row; rows without it are left out.

    Raises TextError, with the name of the file, for a table without such a column, without a text, or a broken one.
    """
    before = csv.field_size_limit(max(csv.field_size_limit(), len(content)))
    try:
        rows = list(csv.reader(StringIO(content.removeprefix("\ufeff"), newline=""), strict=True))
    except csv.Error as error:
        raise TextError(f"{path} is not CSV: {first_line(error)}", hint="a plain text is called .txt") from error
    finally:
        csv.field_size_limit(before)
    names = [name.strip() for name in rows[0]] if rows else []
    if COLUMN not in names and len(names) != 1:
        named = ", ".join(names) or "none"
        raise TextError(
            f"{path} has no column {COLUMN!r}; its columns are {named}"[:500],
            hint=f"the first line names the columns; call the one with the texts {COLUMN!r}",
        )
    place = names.index(COLUMN) if COLUMN in names else 0
    texts = [row[place].strip("\n") for row in rows[1:] if len(row) > place and row[place].strip()]
    if not texts:
        raise TextError(f"{path} has no text under its column {names[place]!r}", hint="one text a row")
    return texts
