"""Hidden states, carried from block to block: a chain for the original and one for each precision.

There are two sets of chains, over different windows: `learning`, what methods learn from, and `checking`, held out for
the final check. Held-out windows have also a chain of dedicated round-to-nearest at each bits, to compare with. All but
the original begin and end in the quantized embedding and head, where these are quantized.

Each chain is a file of the job folder, named by the block that it stands before (calibration/states.py). Those before
the next block are finished before a block's result is made durable, those before the block itself are removed
after, so at any moment there are chains that go with the finished blocks. Where some are missing or damaged all begin
anew, and pass the finished blocks once more.

Of several processes each writes the windows of its own lanes into a file of its own (calibration/pieces.py), and reads
those of the others.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..calibration import BlockRunner
from ..calibration.lanes import Stretch, windows_of
from ..calibration.pieces import Pieces, find_pieces, lanes_on_disk, open_pieces, piece_path
from ..calibration.states import States
from ..progress import log
from .team import Team, lanes_of

ORIGINAL = "original"  # the others are named "<bits>" and "rtn <bits>"
CHAIN = "chain"  # with which the names of files begin that a job removes before it goes on
LEARNING, CHECKING = "learning", "checking"


def baseline(bits: int) -> str:
    """The chain of dedicated round-to-nearest at `bits`."""
    return f"rtn {bits}"


@dataclass(frozen=True)
class ChainSet:
    """The chains of a set, the windows' tokens int64 [n, S], and how they are stored.

    ends: chain's name -> the last block that it stands before; the number of blocks if it passes all.
    """

    ends: Mapping[str, int]
    tokens: Tensor
    dtype: torch.dtype

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.ends)


class Chains:
    """The chains of one job: set -> name -> hidden states [windows, seq_len, hidden] before block `place`.

    prefix: with which the names of its files in `folder` begin.
    team: the processes that carry them.
    """

    def __init__(self, runner: BlockRunner, folder: Path, prefix: str = CHAIN, team: Team | None = None) -> None:
        self.runner, self.folder, self.prefix, self.team = runner, folder, prefix, team or Team()
        self.place = 0
        self.sets: dict[str, ChainSet] = {}
        self._now: dict[str, dict[str, Pieces]] = {LEARNING: {}, CHECKING: {}}
        self._next: dict[str, dict[str, States]] = {LEARNING: {}, CHECKING: {}}  # this process's own
        self._disk = ThreadPoolExecutor(1)
        self._syncing: list[Future[States]] = []

    @property
    def learning(self) -> dict[str, Pieces]:
        return self._now[LEARNING]

    @property
    def checking(self) -> dict[str, Pieces]:
        return self._now[CHECKING]

    def begin(self, sets: Mapping[str, ChainSet], finished: int, embedding: Mapping[str, Tensor]) -> None:
        """Take up the chains that stand before block `finished`, or begin anew before the first block.

        embedding: what all but the original's begin in, by parameter name.
        """
        self.sets = {name: each for name, each in sets.items() if each.names}
        found = self.team.led(lambda: self._found(finished))
        if found is not None:
            self.runner.prepare(next(iter(self.sets.values())).tokens)
            for (name, chain), parts in found.items():
                self._now[name][chain] = self._opened(finished, name, chain, parts)
            self.place = finished
            return
        if finished:
            log.info("resuming: hidden states are missing or damaged; they pass the finished blocks again")
        for name, each in self.sets.items():
            self._start(name, each, embedding)
        self.place = -1
        self.settle()
        self.moved()

    def _found(self, place: int) -> dict[tuple[str, str], list[Stretch]] | None:
        """The lanes of each file of all chains that stand before a block; what lies there beside them is removed.

        None if one is not whole, or if this is the first block.
        """
        found: dict[tuple[str, str], list[Stretch]] | None = {} if place else None
        for name, each in self.sets.items():
            for chain in (chain for chain, end in each.ends.items() if place <= end):
                path = self._path(place, name, chain)
                states = None if found is None else find_pieces(path)
                if found is None or states is None:
                    found = None
                    continue
                states.close()
                whole = states.shape[:2] == each.tokens.shape and states.dtype == each.dtype
                found = {**found, (name, chain): lanes_on_disk(path)} if whole else None
        for path in self.folder.glob(f"{self.prefix}-*"):
            if found is None or not path.name.startswith(f"{self.prefix}-{place:04d}-"):
                path.unlink(missing_ok=True)
        return found

    def _opened(self, place: int, name: str, chain: str, parts: Sequence[Stretch]) -> Pieces:
        each = self.sets[name]
        shape = (*each.tokens.shape, self.runner.hidden_size)
        return open_pieces(self._path(place, name, chain), parts, shape, each.dtype)

    def _start(self, name: str, each: ChainSet, embedding: Mapping[str, Tensor]) -> None:
        """Chains before the first block."""
        of_original = [chain for chain in each.names if chain == ORIGINAL or not embedding]
        others = [chain for chain in each.names if chain not in of_original]
        for chains, replaced in ((of_original, None), (others, embedding)):
            if chains:
                parts = self.runner.embedded(each.tokens, replaced, self.team)
                first = list(itertools.islice(parts, 1))  # from here on it is known how wide they are
                files = [self._create(0, name, chain) for chain in chains]
                for part in itertools.chain(first, parts):
                    for file in files:
                        file.append(part)
                for chain, file in zip(chains, files, strict=True):
                    self._done(name, chain, file)

    def _path(self, place: int, name: str, chain: str) -> Path:
        return self.folder / f"{self.prefix}-{place:04d}-{name}-{re.sub(r'[^0-9a-z]', '-', chain)}"

    def _create(self, place: int, name: str, chain: str) -> States:
        """For this process's own windows."""
        each = self.sets[name]
        rows = windows_of(len(each.tokens), self.team)
        shape = (rows.stop - rows.start, each.tokens.shape[1], self.runner.hidden_size)
        return States.create(piece_path(self._path(place, name, chain), self.team.lanes), shape, each.dtype)

    def advance(self, name: str, chain: str, outputs: Iterable[Tensor]) -> bool:
        """Move a chain past the block it stands before, whose `outputs` on this process's windows these are, in order.

        Where the chain ends before that, the outputs are not asked for. Returns whether it was moved.
        """
        if self.place >= self.sets[name].ends[chain]:
            return False
        behind = self._create(self.place + 1, name, chain)
        for part in outputs:
            behind.append(part)
        self._done(name, chain, behind)
        return True

    def behind(self, name: str, chain: str) -> Pieces:
        """A chain that has been moved, as a whole: every process asks for it."""
        self.settle()
        return self._whole(self.place + 1, name, chain)

    def _whole(self, place: int, name: str, chain: str) -> Pieces:
        """What all processes have written."""
        parts = [lanes_of(rank, self.team.size) for rank in range(self.team.size)]
        return self._opened(place, name, chain, parts)

    def _done(self, name: str, chain: str, states: States) -> None:
        self._next[name][chain] = states
        self._syncing.append(self._disk.submit(states.finish))  # the disk works while the next chain is computed

    def settle(self) -> None:
        """Wait until all that have advanced are durable, in every process."""
        for each in self._syncing:
            each.result()
        self._syncing.clear()
        self.team.wait()

    def moved(self) -> None:
        """All have passed the block, and its result is durable: the files before it are no longer needed."""
        self.team.wait()
        for pieces in self._now.values():
            for each in pieces.values():
                self._remove(each)
        self.place += 1
        self._now = {
            name: {chain: self._whole(self.place, name, chain) for chain in chains}
            for name, chains in self._next.items()
        }
        for chains in self._next.values():
            for states in chains.values():
                states.close()
        self._next = {LEARNING: {}, CHECKING: {}}
        self.team.wait()  # whoever removes one of them now finds that all have it open

    def _remove(self, states: Pieces) -> None:
        if self.team.leads:
            states.remove()
        else:
            states.close()

    def close(self) -> None:
        """Let go of the files, and leave them."""
        for chains in (self._now, self._next):
            for of_set in chains.values():
                for each in of_set.values():
                    each.close()

    def drop(self, name: str) -> None:
        """The set is no longer needed."""
        for states in self._now[name].values():
            self._remove(states)
        self._now[name] = {}
