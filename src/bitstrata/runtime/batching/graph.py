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

import itertools
import threading
import warnings
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
MOST_ROWS = ROWS[-1]
LENGTHS = (512, 2048, 8192, 32768)  # and the whole cache
SYNCHRONIZES = "called a synchronizing"  # what torch warns
MOST = 16  # graphs at a time; the one that was not used for longest makes room

T = TypeVar("T")


def captured(
    work: Callable[[], T], pool: Any = None, stream: torch.cuda.Stream | None = None
) -> tuple[Callable[[], None], T]:
    """`work` as a CUDA graph of the current device: what runs it again, and its result, which each run writes anew.

    It runs once before. Raises RuntimeError if it makes the host wait for the device: found then, since a recording
    that breaks off leaves torch's allocator and random generators in disorder.

    Args:
        pool: of memory, shared with other graphs of the same stream; one of its own by default.
        stream: to record on.
    """
    stream = stream or torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        waits = _waits_of(work)  # compiles kernels too, and lets libraries allocate what they keep
        if waits:
            raise RuntimeError(f"the host waits for the device at {waits[0]}")
        # thread_local: what other threads do meanwhile, with other models, is no part of this
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            result = work()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, result


def _waits_of(work: Callable[[], object]) -> list[str]:
    """Run `work`; where in the sources it made the host wait for the device, as torch warns on request."""
    found: list[str] = []
    thread, before = threading.get_ident(), torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
            if SYNCHRONIZES not in str(message):
                shown(message, category, filename, lineno, *rest)
            elif threading.get_ident() == thread:
                found.append(f"{filename}:{lineno}")

        warnings.showwarning = show  # type: ignore[assignment]
        warnings.filterwarnings("always", message=f".*{SYNCHRONIZES}")
        warnings.filterwarnings("ignore", message="Synchronization debug mode")  # is a prototype, it says
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return found


class GraphStep:
    """`model` by CUDA graphs, with keys and values in `pool`, whose layers have been written.

    Args:
        calls: of each layer, how the model's own forward called attention.

    Raises UnfitError.
    """

    def __init__(self, model: PreTrainedModel, pool: TokenPool, calls: Mapping[int, AttentionCall]) -> None:
        self._model, self._state, self._device = model, bits_state(model), model.device
        devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        if self._device.type != "cuda" or len(devices) > 1:
            raise UnfitError(f"the model is on {', '.join(sorted(map(str, devices)))}, not on one GPU")
        for module in model.modules():
            if has_hooks(module):
                raise UnfitError(f"a {type(module).__name__} has hooks")
        self._layers, self._version = list(calls), self._state.version
        self._graphs: dict[tuple[int, int], tuple[Callable[[], None], Tensor]] = {}  # what replays it, and its logits
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()  # a step that this takes the place of may still run
            self._stream, self._memory = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            self._inputs = _Inputs(len(self._state.layers), self._device)
        self.use(pool)

    def use(self, pool: TokenPool) -> None:
        """Keep keys and values in `pool`, which has the tensors of every layer. Raises UnfitError for int8 and int4."""
        if pool.kv_cache_dtype != "auto":
            raise UnfitError(f"keys and values are kept in {pool.kv_cache_dtype}")
        for layer in self._layers:
            if (why := reason(pool.layer(layer)[0].dtype)) is not None:
                raise UnfitError(why)
        self._graphs.clear()
        self._pool, self._made_for = pool, pool.version

    @property
    def is_current(self) -> bool:
        """Whether the model still holds the weights that this was made of, and the pool its tensors."""
        return self._version == self._state.version and self._made_for == self._pool.version

    def fits(self, rows: int) -> bool:
        """Whether one step takes so many tokens."""
        return rows <= MOST_ROWS

    def run(self, tokens: Sequence[Sequence[int]], spans: Sequence[Span], bits: Sequence[Assignment]) -> Tensor:
        """As Forward.run, of at most MOST_ROWS tokens; raises UnfitError if there is no graph and none can be made."""
        ids = [token for part in tokens for token in part]
        positions = [span.past + step for span in spans for step in range(span.length)]
        starts = [span.start for span in spans for _ in range(span.length)]
        choices = [one.choices[0] for one, span in zip(bits, spans, strict=True) for _ in range(span.length)]
        rows = next(rows for rows in ROWS if rows >= len(ids))
        longest = min([length for length in LENGTHS if length > max(positions)] + [self._pool.tokens])
        with torch.cuda.device(self._device):
            replay, logits = self._graph(rows, longest)
            self._inputs.send(ids, positions, starts, choices)
            replay()
        if len(spans) == len(ids):
            return logits[: len(ids)].clone()  # the next replay writes there
        ends = itertools.accumulate(span.length for span in spans)
        return torch.stack([logits[end - 1] for end in ends])

    def _graph(self, rows: int, longest: int) -> tuple[Callable[[], None], Tensor]:
        """For so many rows, none of which is longer than `longest`."""
        key = rows, longest
        found = self._graphs.pop(key, None)
        if found is None:
            if len(self._graphs) >= MOST:
                torch.cuda.synchronize()  # its memory is given to others
                del self._graphs[next(iter(self._graphs))]
            try:
                found = self._recorded(rows, longest)
            except Exception as error:
                raise UnfitError(f"recording a graph of {rows} rows ends with {error!r}") from error
        self._graphs[key] = found  # the last is the latest
        return found

    def _recorded(self, rows: int, longest: int) -> tuple[Callable[[], None], Tensor]:
        ids, positions, starts, lengths = self._inputs.numbers[:, :rows]
        batch = RowBatch(self._pool, starts, lengths, longest)
        only = [held[0] if len(held) == 1 else None for held in self._state.layers.values()]
        bits = BitsOfRows(self._inputs.bits[:, :rows], only)
        self._inputs.send([], [], [], [self._state.resolve(None).choices[0]])  # nothing but padding

        def work() -> Tensor:
            logits: Tensor = self._model(
                input_ids=ids[None], position_ids=positions[None], use_cache=False, bitstrata_batch=batch, bits=bits
            ).logits
            return logits[0].float()

        return captured(work, self._memory, self._stream)


class _Inputs:
    """What graphs read, for MOST_ROWS rows: one buffer on the device, filled by one copy.

    numbers: tokens, positions, starts, lengths, int64 [4, rows]. bits: int8 [layers, rows]. Each line begins at a
    multiple of 16 bytes, which kernels are compiled for.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        size = MOST_ROWS * (4 * 8 + layers)
        self._layers = layers
        self._here = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
        self._there = torch.zeros(size, dtype=torch.uint8, device=device)
        self._sent = torch.cuda.Event()
        self._columns: dict[Choice, Tensor] = {}
        self.numbers, self.bits = self._parts(self._there)

    def _parts(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        split = MOST_ROWS * 4 * 8
        numbers, bits = buffer[:split].view(torch.int64), buffer[split:].view(torch.int8)
        return numbers.view(4, MOST_ROWS), bits.view(self._layers, MOST_ROWS)

    def send(
        self, ids: Sequence[int], positions: Sequence[int], starts: Sequence[int], choices: Sequence[Choice]
    ) -> None:
        """Of each row; the rest is padding, at the bits of the first."""
        self._sent.synchronize()  # what is written over has arrived
        numbers, bits = self._parts(self._here)
        padding = [0] * (MOST_ROWS - len(ids))
        lengths = [position + 1 for position in positions]
        numbers.copy_(torch.tensor([[*part, *padding] for part in (ids, positions, starts, lengths)]))
        columns = [self._column(choice) for choice in choices]
        bits.copy_(torch.stack(columns + columns[:1] * (MOST_ROWS - len(columns)), 1))
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
