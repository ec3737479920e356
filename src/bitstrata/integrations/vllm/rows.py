"""What every row of the step that runs asks for: written by who knows the requests, read by every layer.

A row carries the place of its request's choice among all that is offered, bits and plans. Each layer has a table that
gives its bits for every choice; layers with equal tables share one, and without plans all layers do.

runner V1   `requests` has the choices by a request's place in the batch; the places' rows come with each step
runner V2   `buffer` has the bits of every row, for every table; it is written before each step and keeps its address,
            so a recorded graph reads what the next step writes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UsageError


class Rows:
    """The rows of one model.

    Args:
        bits: of each layer by its name, one value for each choice.
        choices: how many there are.
        default: the choice of requests that ask for nothing, and of steps without requests (warming up).
    """

    def __init__(self, bits: Mapping[str, Sequence[int]], choices: int, default: int) -> None:
        own = tuple(range(choices))
        self.tables = [own, *sorted({tuple(table) for table in bits.values()})]
        self._table_of = {layer: self.tables.index(tuple(table)) for layer, table in bits.items()}
        self.default = default
        self.requests: dict[int, int] = {}  # place in the batch -> choice
        self.buffer: Tensor | None = None  # int8 [tables, most rows of a step]
        self._step: object | None = None
        self._counts: Tensor | None = None  # rows of each request of the step
        self._now: dict[int, int | Tensor] = {}  # table -> bits of the step's rows

    def of_layer(self, layer: str) -> LayerRows:
        """The rows as `layer` reads them."""
        return self.of_table(self._table_of[layer])

    def of_choices(self) -> LayerRows:
        """The rows with their choices themselves, for who looks up many layers at once."""
        return self.of_table(0)

    def of_table(self, table: int) -> LayerRows:
        return LayerRows(self, table)

    def fixed(self, choice: int) -> Rows:
        """Rows of the same layers that are always at one choice."""
        rows = copy(self)
        rows.default, rows.requests, rows.buffer = choice, {}, None
        return rows

    def hold_buffer(self, rows: int, device: torch.device | str) -> Tensor:
        """From now on rows are read from a buffer of so many, which is returned; they start at the default."""
        start = torch.tensor([table[self.default] for table in self.tables], dtype=torch.int8, device=device)
        self.buffer = start[:, None].repeat(1, rows)
        return self.buffer

    def bits(self, table: int, step: object | None, starts: Sequence[int] | None) -> int | Tensor:
        """Bits of all rows of a step, for the layers of one table: one value, or int8 [rows of its requests]."""
        if starts is None or not self.requests:
            return self.tables[table][self.default]
        if step is not self._step:
            self._step, self._counts, self._now = step, None, {}
        if table not in self._now:
            self._now[table] = self._expand(self.tables[table], starts)
        return self._now[table]

    def _expand(self, table: tuple[int, ...], starts: Sequence[int]) -> int | Tensor:
        bits = [table[self.requests[place]] for place in range(len(starts) - 1)]
        if len(set(bits)) == 1:
            return bits[0]
        if self._counts is None:
            self._counts = torch.tensor(starts).diff()
        return torch.tensor(bits, dtype=torch.int8).repeat_interleave(self._counts)


@dataclass(frozen=True)
class LayerRows:
    """The rows of a model as the layers of one table read them."""

    whole: Rows
    table: int

    @property
    def needed(self) -> frozenset[int]:
        """The bits that the layers run at."""
        return frozenset(self.whole.tables[self.table])

    def of(self, rows: int, step: object | None, starts: Sequence[int] | None) -> int | Tensor:
        """Bits of `rows` rows: one value, or int8 [rows].

        Args:
            step: an object that is another one in the next step.
            starts: rows before each request, and all of them; None in a step without requests.

        Raises UsageError if these are fewer than the rows of the step's requests.
        """
        whole = self.whole
        if whole.buffer is not None:
            return whole.buffer[self.table, :rows]
        found = whole.bits(self.table, step, starts)
        if isinstance(found, Tensor) and len(found) != rows:
            if len(found) > rows:
                raise UsageError(f"a layer has {rows} rows in a step of {len(found)}: whose they are is not known")
            filler = found.new_full((rows - len(found),), whole.tables[self.table][whole.default])
            return torch.cat([found, filler])  # what a runner pads a batch with
        return found
