"""A decoding step as a CUDA graph: the model's own modules, recorded once, then one launch a step.

Recorded are batches of 1, 2, 4, 8 or 16 rows, a row one token; smaller ones are padded. What differs from step to step
lies in one buffer on the device, which is written before each replay: tokens, positions, where each row's range of the
cache begins, how long it is by now, and the bits of every layer for every row. So one graph serves any requests at any
bits, mixed ones included. Only the longest row counts beside the number of rows: it bounds the grid of attention
(kernels/attention.py), in steps of LENGTHS. A row of padding has length 0: it writes nothing, and sees nothing.

Any architecture that runs in batches can be recorded, unless its forward waits for the device or asks something of
Python that a replay would not ask again (hooks): UnfitError then says what. It also comes from a later step, for which
there is no memory, say; Forward goes on without graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...kernels.attention import reason
from ...models.compat import has_hooks
from ...nn import Assignment, bits_state
from ...nn.bits import Choice, expand_rows
from .attention import AttentionCall, RowBatch, Span
from .memory import TokenPool
from .native import UnfitError

ROWS = (1, 2, 4, 8, 16)
LENGTHS = (512, 2048, 8192, 32768)  # and no bound
MOST = 16  # graphs at a time; the one that was not used for longest makes room

T = TypeVar("T")


def captured(
    work: Callable[[], T], pool: Any = None, stream: torch.cuda.Stream | None = None
) -> tuple[Callable[[], None], T]:
    """`work` as a CUDA graph of the current device: what runs it again, and its result, which each run writes anew.

    It runs once before, and nothing in it may wait for the device.

    Args:
        pool: of memory, shared with other graphs of the same stream; one of its own by default.
        stream: to record on.
    """
    stream = stream or torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        work()  # compiles kernels, and lets libraries allocate what they keep
        # thread_local: what other threads do meanwhile, with other models, is no part of this
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            result = work()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, result


class GraphStep:
    """`model` by CUDA graphs, with keys and values in `pool`, whose layers have been written.

    Args:
        calls: of each layer, how the model's own forward called attention.

    Raises UnfitError.
    """

    def __init__(self, model: PreTrainedModel, pool: TokenPool, calls: Mapping[int, AttentionCall]) -> None:
        self._device = model.device
        self._model, self._pool, self._state = model, pool, bits_state(model)
        devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        if self._device.type != "cuda" or len(devices) > 1:
            raise UnfitError(f"the model is on {', '.join(sorted(map(str, devices)))}, not on one GPU")
        for module in model.modules():
            if has_hooks(module):
                raise UnfitError(f"a {type(module).__name__} has hooks")
        for layer in calls:
            if (why := reason(pool.layer(layer)[0].dtype)) is not None:
                raise UnfitError(why)
        self._version, self._made_for = self._state.version, pool.version
        self._graphs: dict[tuple[int, int], _Recorded] = {}
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()  # a step that this takes the place of may still run
            self._stream, self._memory = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    @property
    def is_current(self) -> bool:
        """Whether the model still holds the weights that this was made of, and the pool its tensors."""
        return self._version == self._state.version and self._made_for == self._pool.version

    def fits(self, rows: int) -> bool:
        """Whether one step takes so many tokens."""
        return rows <= ROWS[-1]

    def run(self, tokens: Sequence[Sequence[int]], spans: Sequence[Span], bits: Sequence[Assignment]) -> Tensor:
        """As Forward.run, of at most ROWS[-1] tokens; raises UnfitError if there is no graph and none can be made."""
        ids = [token for part in tokens for token in part]
        positions = [span.past + step for span in spans for step in range(span.length)]
        starts = [span.start for span in spans for _ in range(span.length)]
        choices = [one.choices[0] for one, span in zip(bits, spans, strict=True) for _ in range(span.length)]
        rows = next(rows for rows in ROWS if rows >= len(ids))
        longest = next((length for length in LENGTHS if length > max(positions)), self._pool.tokens)
        with torch.cuda.device(self._device):
            logits = self._graph(rows, min(longest, self._pool.tokens)).run(ids, positions, starts, choices)
        if len(spans) == len(ids):
            return logits[: len(ids)].clone()  # the next replay writes there
        ends = torch.tensor([span.length for span in spans]).cumsum(0) - 1
        return torch.stack([logits[end] for end in ends.tolist()])

    def _graph(self, rows: int, longest: int) -> _Recorded:
        key = rows, longest
        graph = self._graphs.pop(key, None)
        if graph is None:
            if len(self._graphs) >= MOST:
                torch.cuda.synchronize(self._device)  # the memory of what may still run is given to others
                del self._graphs[next(iter(self._graphs))]
            try:
                graph = _Recorded(self, rows, longest)
            except Exception as error:
                raise UnfitError(f"recording a graph of {rows} rows ends with {error!r}") from error
        self._graphs[key] = graph  # the last is the latest
        return graph


class _Recorded:
    """One graph, for `rows` rows none of which is longer than `longest`, and the buffers that it reads."""

    def __init__(self, step: GraphStep, rows: int, longest: int) -> None:
        state, device = step._state, step._device
        self._rows, self._layers = rows, len(state.layers)
        size = 4 * 8 * rows + self._layers * rows
        self._here = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
        self._there = torch.zeros(size, dtype=torch.uint8, device=device)
        self._sent = torch.cuda.Event()
        self._columns: dict[Choice, Tensor] = {}
        numbers, table = self._parts(self._there)
        ids, positions, starts, lengths = numbers
        batch = RowBatch(step._pool, starts, lengths, longest)
        bits = BitsOfRows(table, [held[0] if len(held) == 1 else None for held in state.layers.values()])
        # as padding has it, in the first run and in the one that is recorded
        self._fill([], [], [], [state.resolve(None).choices[0]])

        def work() -> Tensor:
            logits: Tensor = step._model(
                input_ids=ids[None], position_ids=positions[None], use_cache=False, bitstrata_batch=batch, bits=bits
            ).logits
            return logits[0].float()

        self._replay, self._logits = captured(work, step._memory, step._stream)

    def run(
        self, ids: Sequence[int], positions: Sequence[int], starts: Sequence[int], choices: Sequence[Choice]
    ) -> Tensor:
        """Logits [rows, V] float32, until the next run; what comes after the given rows is of no use."""
        self._fill(ids, positions, starts, choices)
        self._replay()
        return self._logits

    def _parts(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """tokens, positions, starts and lengths: int64 [4, rows]; bits: int8 [layers, rows]."""
        split = 4 * 8 * self._rows
        numbers, table = buffer[:split].view(torch.int64), buffer[split:].view(torch.int8)
        return numbers.view(4, self._rows), table.view(self._layers, self._rows)

    def _fill(
        self, ids: Sequence[int], positions: Sequence[int], starts: Sequence[int], choices: Sequence[Choice]
    ) -> None:
        """Send these; padding runs at the bits of the first row."""
        self._sent.synchronize()  # what is written over has arrived
        numbers, table = self._parts(self._here)
        padding = [0] * (self._rows - len(ids))
        lengths = [position + 1 for position in positions]
        numbers.copy_(torch.tensor([[*part, *padding] for part in (ids, positions, starts, lengths)]))
        columns = [self._column(choice) for choice in choices]
        columns += [columns[0]] * (self._rows - len(columns))
        table.copy_(torch.stack(columns, 1))
        self._there.copy_(self._here, non_blocking=True)
        self._sent.record()

    def _column(self, choice: Choice) -> Tensor:
        """The bits of every layer that follows what is asked for, int8."""
        column = self._columns.get(choice)
        if column is None:
            column = self._columns[choice] = torch.tensor(choice[: self._layers], dtype=torch.int8)
        return column


class BitsOfRows(Assignment):
    """Bits as data: int8 [layers, rows] on the device, one entry a layer and row.

    only: of each layer, the bits if it holds no others, which need no table.
    """

    def __init__(self, table: Tensor, only: Sequence[int | None]) -> None:
        super().__init__("bits of each row", (), table)
        self._each, self._only = list(table.unbind()), only

    def for_tokens(self, tokens: Tensor | None) -> Assignment:
        """Itself: a row is a token."""
        return self

    def at(self, place: int, shape: torch.Size, device: torch.device | None) -> int | Tensor:
        """As of Assignment."""
        only = self._only[place]
        return expand_rows(self._each[place], shape) if only is None else only
