"""The bits of every row of the step that runs: written by who knows the requests, read by every layer.

runner V1   `requests` has the bits by a request's place in the batch; the places' rows come with each step
runner V2   `buffer` has the bits of every row; it is written before each step and keeps its address, so a recorded
            graph reads what the next step writes
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import UsageError


class Rows:
    """Args: default: bits of requests that ask for none, and of steps without requests (warming up)."""

    def __init__(self, default: int) -> None:
        self.default = default
        self.requests: dict[int, int] = {}  # place in the batch -> bits
        self.buffer: Tensor | None = None  # int8 [most rows of a step]
        self._step: object | None = None
        self._now: int | Tensor = default

    def hold_buffer(self, rows: int, device: torch.device | str) -> Tensor:
        """From now on rows are read from a buffer of so many, which is returned; they start at the default."""
        self.buffer = torch.full((rows,), self.default, dtype=torch.int8, device=device)
        return self.buffer

    def of(self, rows: int, step: object | None, starts: Sequence[int] | None) -> int | Tensor:
        """Bits of `rows` rows: one value, or int8 [rows].

        Args:
            step: an object that is another one in the next step.
            starts: rows before each request, and all of them; None in a step without requests.
        """
        if self.buffer is not None:
            return self.buffer[:rows]
        if starts is None or not self.requests:
            return self.default
        if step is not self._step:
            self._now = self._expand(starts)
            self._step = step
        found = self._now
        if isinstance(found, Tensor) and len(found) != rows:
            if len(found) > rows:
                raise UsageError(f"a layer has {rows} rows in a step of {len(found)}: whose they are is not known")
            filler = found.new_full((rows - len(found),), self.default)
            return torch.cat([found, filler])  # what a runner pads a batch with
        return found

    def _expand(self, starts: Sequence[int]) -> int | Tensor:
        bits = [self.requests[place] for place in range(len(starts) - 1)]
        if len(set(bits)) == 1:
            return bits[0]
        counts = torch.tensor(starts).diff()
        return torch.tensor(bits, dtype=torch.int8).repeat_interleave(counts)
