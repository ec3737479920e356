"""The processes that work on one job: each has some lanes of the windows, and the first one leads.

All run the same stages side by side. What reads windows is divided by lanes (calibration/lanes.py), what solves linears
by their cost (`each`), and what neither is worth dividing nor can be, the leader does alone (`led`) while the others
wait. Only the leader writes results; every process writes the hidden states of its own windows.

Numbers go from process to process as tensors, by gloo or, between GPUs, by NCCL. All else is pickled and goes through
the leader, by gloo: so whoever finds that the other side has ended knows who that is. Nobody waits for a limited time,
because the leader may be busy for hours; a connection breaks when a process ends.
"""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..calibration.lanes import LANES, Share, Stretch, is_pair, stretches_of
from ..errors import BitstrataError, ProcessError, UsageError
from ..memory import is_out_of_memory

T = TypeVar("T")
R = TypeVar("R")

AGAIN = "run the same command again: finished blocks are kept"
SETTLING = 5.0  # seconds in which those that go on after a failure say so
FAILED, ALIVE = "failed", "alive"  # keys of the store, with a rank behind


def lanes_of(rank: int, size: int) -> Stretch:
    """The lanes of one of so many processes."""
    return LANES * rank // size, LANES * (rank + 1) // size


def check_size(size: int) -> None:
    """Raise UsageError for more processes than there are lanes."""
    if size > LANES:
        raise UsageError(
            f"{size} processes were asked for, and a job is divided into {LANES} parts",
            hint=f"use at most {LANES} devices",
        )


def shared_out(costs: Sequence[float], size: int) -> list[int]:
    """Who does which piece of work: the most costly first, each to whom has the least, in one fixed order."""
    loads, owners = [0.0] * size, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        owners[index] = min(range(size), key=lambda rank: (loads[rank], rank))
        loads[owners[index]] += costs[index]
    return owners


class Team(Share):
    """A process that is alone, which is the leader of nobody; `Together` is one of several."""

    rank: int = 0
    size: int = 1
    names: Sequence[str] = ("this process",)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def led(self, work: Callable[[], T]) -> T:
        """What `work` returns in the leader; in the others it does not run.

        Raises what it raises there; ProcessError in the others.
        """
        return work()

    def everyone(self, value: T) -> list[T]:
        """The values that all processes call this with, by rank."""
        return [value]

    def each(self, costs: Sequence[float], work: Callable[[int], R]) -> list[R]:
        """`work` of every index of `costs`, divided over the processes; all get all results."""
        return [work(index) for index in range(len(costs))]

    def wait(self) -> None:
        """Until all are here."""

    def agree(self, what: str, mine: Any, differ: Callable[[Any, Any], list[str]]) -> None:
        """Raise UsageError in every process if one was given something else than the leader; `differ` says what."""


class Store(Protocol):
    """What is used of torch's stores."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


class Together(Team):
    """One of several processes.

    Args:
        rank, size: which one of how many.
        store: where a process says why it ends.
        device: its own.
        ended: rank -> how that process ended, in words; None while it runs, or if nobody knows.
        control: the group of all processes over gloo; None for torch's default one.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: Store,
        device: torch.device,
        ended: Callable[[int], str | None] = lambda rank: None,
        control: Any = None,
    ) -> None:
        self.rank, self.size, self.lanes, self.device = rank, size, lanes_of(rank, size), device
        self.names = [f"process {other}" for other in range(size)]
        self._store, self._ended, self._control = store, ended, control

    def introduce(self, host: str) -> None:
        """Learn where the others run. Raises UsageError if two have the same GPU."""
        places = self.everyone((host, str(self.device)))
        self.names = [f"process {rank} ({device} on {host})" for rank, (host, device) in enumerate(places)]
        for rank, place in enumerate(places):
            if place[1] != "cpu" and place in places[:rank]:
                raise UsageError(
                    f"processes {places.index(place)} and {rank} were both given {place[1]} of {place[0]}",
                    hint="leave --device out, so that each takes a GPU of its own",
                )
        kinds = {device.partition(":")[0] for _, device in places}
        if len(kinds) > 1:
            raise UsageError(
                f"some processes have GPUs and some have none: {', '.join(self.names)}",
                hint="results differ between them; give all of them --device cpu, or a GPU",
            )

    def agree(self, what: str, mine: Any, differ: Callable[[Any, Any], list[str]]) -> None:
        values = self.everyone(mine)
        for rank, other in enumerate(values):
            lines = differ(values[0], other)
            if lines:
                raise UsageError(
                    f"{self.names[rank]} has other {what} than {self.names[0]}: "
                    + "; ".join(line.replace(" was ", " is ").replace(", is now ", " there, ") for line in lines),
                    hint="start all processes with the same command, versions, model and text",
                )

    def led(self, work: Callable[[], T]) -> T:
        if not self.leads:
            result: T = self._receive(0)
            return result
        result = work()
        for rank in range(1, self.size):
            self._send(result, rank)
        return result

    def everyone(self, value: T) -> list[T]:
        if self.leads:
            values = [value, *(self._receive(rank) for rank in range(1, self.size))]
            return self.led(lambda: values)
        self._send(value, 0)
        return self.led(list)

    def each(self, costs: Sequence[float], work: Callable[[int], R]) -> list[R]:
        owners = shared_out(costs, self.size)
        mine = {index: work(index) for index, owner in enumerate(owners) if owner == self.rank}
        found: dict[int, R] = {}
        for of in self.everyone(mine):
            found.update(of)
        return [found[index] for index in range(len(costs))]

    def wait(self) -> None:
        self.everyone(None)

    def counted(self, own: int) -> int:
        return sum(self.everyone(own))

    def total(self, parts: Sequence[tuple[Stretch, Tensor]]) -> Tensor:
        """The tree over all processes: whoever has the left of two sums gets the right one, and the leader the last."""
        held = dict(parts)
        like = next(iter(held.values()))
        whole: list[tuple[Stretch, int]] = []
        for owner in range(self.size):
            for stretch in stretches_of(lanes_of(owner, self.size)):
                whole.append((stretch, owner))
                while len(whole) > 1 and is_pair(whole[-2][0], whole[-1][0]):
                    (left, first), (right, second) = whole[-2:]
                    if self.rank == first:
                        other = held.pop(right) if second == first else self._take(torch.empty_like(like), second)
                        held[left[0], right[1]] = held.pop(left).add_(other)
                    elif self.rank == second:
                        self._give(held.pop(right), first)
                    whole[-2:] = [((left[0], right[1]), first)]
        result = held.pop((0, LANES)) if self.leads else torch.empty_like(like)
        with self._with(None):
            dist.broadcast(result, 0)
        return result

    def _give(self, tensor: Tensor, rank: int) -> None:
        with self._with(rank):
            dist.send(tensor, rank)

    def _take(self, into: Tensor, rank: int) -> Tensor:
        with self._with(rank):
            dist.recv(into, rank)
        return into

    def _send(self, value: Any, rank: int) -> None:
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        with self._with(rank):
            dist.send(torch.tensor([len(data)]), rank, group=self._control)
            dist.send(data, rank, group=self._control)

    def _receive(self, rank: int) -> Any:
        length = torch.zeros(1, dtype=torch.int64)
        with self._with(rank):
            dist.recv(length, rank, group=self._control)
            data = torch.empty(int(length), dtype=torch.uint8)
            dist.recv(data, rank, group=self._control)
        return pickle.loads(data.numpy().tobytes())

    @contextlib.contextmanager
    def _with(self, rank: int | None) -> Iterator[None]:
        """Around an exchange with `rank`, or with all: what breaks it becomes an error that says who has ended."""
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise self._blame(rank) from error

    def _blame(self, rank: int | None) -> ProcessError:
        """Who has ended, and why, as far as that can be found out: what they said, how they went, who is still here."""
        try:
            self._store.set(f"{ALIVE}/{self.rank}", "")
            until = time.monotonic() + SETTLING
            while time.monotonic() < until:
                for other in range(self.size):
                    if self._store.check([f"{FAILED}/{other}"]):
                        said = pickle.loads(bytes.fromhex(self._store.get(f"{FAILED}/{other}").decode()))
                        return self.failure(other, said)
                    how = self._ended(other)
                    if how is not None:
                        return ProcessError(f"{self.names[other]} {how}", hint=AGAIN)
                time.sleep(0.1)
            silent = [other for other in range(self.size) if not self._store.check([f"{ALIVE}/{other}"])]
            rank = silent[0] if rank not in silent and silent else rank
        except RuntimeError:  # the store went with the leader
            rank = 0
        who = "another process" if rank is None else self.names[rank]
        return ProcessError(f"{who} has ended, or cannot be reached any more", hint=AGAIN)

    def failure(self, rank: int, said: tuple[str, str | None, int]) -> ProcessError:
        """The error of another process, as what ends this one."""
        message, hint, code = said
        error = ProcessError(f"{self.names[rank]}: {message}", hint=hint)
        error.exit_code = code
        return error

    def tell(self, error: BaseException) -> None:
        """Say to the others why this process ends, as far as they can still be reached."""
        if isinstance(error, ProcessError):
            return  # not its own
        said: tuple[str, str | None, int] = (str(error) or type(error).__name__, None, 1)
        if isinstance(error, BitstrataError):
            said = (error.message, error.hint, error.exit_code)
        elif isinstance(error, KeyboardInterrupt):
            said = ("interrupted", AGAIN, 130)
        with contextlib.suppress(RuntimeError):
            self._store.set(f"{FAILED}/{self.rank}", pickle.dumps(said).hex())
