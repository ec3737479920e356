"""Hidden states, carried from block to block: a chain for the original and one for each precision.

There are two sets of chains, over different windows: `learning`, what methods learn from, and `checking`, held out for
the final check. Held-out windows have also a chain of dedicated round-to-nearest at each bits, to compare with. All but
the original begin and end in the quantized embedding and head, where these are quantized.

Each chain is a file of the job folder, named by the block that it stands before (calibration/states.py). Those before
the next block are finished before a block's result is made durable, those before the block itself are removed
after, so at any moment there are chains that go with the finished blocks. Where some are missing or damaged all begin
anew, and pass the finished blocks once more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..calibration import BlockRunner
from ..calibration.states import States
from ..progress import log

ORIGINAL = "original"  # the others are named "<bits>" and "rtn <bits>"
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
    """

    def __init__(self, runner: BlockRunner, folder: Path, prefix: str = "chain") -> None:
        self.runner, self.folder, self.prefix = runner, folder, prefix
        self.place = 0
        self.sets: dict[str, ChainSet] = {}
        self._now: dict[str, dict[str, States]] = {LEARNING: {}, CHECKING: {}}
        self._next: dict[str, dict[str, States]] = {LEARNING: {}, CHECKING: {}}
        self._disk = ThreadPoolExecutor(1)
        self._syncing: list[Future[States]] = []

    @property
    def learning(self) -> dict[str, States]:
        return self._now[LEARNING]

    @property
    def checking(self) -> dict[str, States]:
        return self._now[CHECKING]

    def begin(self, sets: Mapping[str, ChainSet], finished: int, embedding: Mapping[str, Tensor]) -> None:
        """Take up the chains that stand before block `finished`, or begin anew before the first block.

        embedding: what all but the original's begin in, by parameter name.
        """
        self.sets = {name: each for name, each in sets.items() if each.names}
        for path in self.folder.glob(f"{self.prefix}-*"):
            if not path.name.startswith(f"{self.prefix}-{finished:04d}-"):
                path.unlink(missing_ok=True)
        if finished and self._find(finished):
            self.runner.prepare(next(iter(self.sets.values())).tokens)
            return
        if finished:
            log.info("resuming: hidden states are missing or damaged; they pass the finished blocks again")
        for name, each in self.sets.items():
            self._start(name, each, embedding)
        self.settle()
        self._now, self._next, self.place = self._next, {LEARNING: {}, CHECKING: {}}, 0

    def _find(self, place: int) -> bool:
        found: dict[str, dict[str, States]] = {LEARNING: {}, CHECKING: {}}
        for name, each in self.sets.items():
            for chain in (chain for chain, end in each.ends.items() if place <= end):
                states = States.find(self._path(place, name, chain))
                whole = states is not None and states.shape[:2] == each.tokens.shape and states.dtype == each.dtype
                if states is None or not whole:
                    return False
                found[name][chain] = states
        self._now, self.place = found, place
        return True

    def _start(self, name: str, each: ChainSet, embedding: Mapping[str, Tensor]) -> None:
        """Chains before the first block."""
        of_original = [chain for chain in each.names if chain == ORIGINAL or not embedding]
        others = [chain for chain in each.names if chain not in of_original]
        for chains, replaced in ((of_original, None), (others, embedding)):
            if chains:
                files: list[States] = []
                for part in self.runner.embedded(each.tokens, replaced):
                    if not files:
                        shape = (*each.tokens.shape, part.shape[-1])
                        files = [self._create(0, name, chain, shape, each.dtype) for chain in chains]
                    for file in files:
                        file.append(part)
                for chain, file in zip(chains, files, strict=True):
                    self._done(name, chain, file)

    def _path(self, place: int, name: str, chain: str) -> Path:
        return self.folder / f"{self.prefix}-{place:04d}-{name}-{re.sub(r'[^0-9a-z]', '-', chain)}"

    def _create(self, place: int, name: str, chain: str, shape: Sequence[int], dtype: torch.dtype) -> States:
        return States.create(self._path(place, name, chain), shape, dtype)

    def advance(self, name: str, chain: str, outputs: Iterable[Tensor]) -> States | None:
        """Move a chain past the block it stands before, whose `outputs` on all of its windows these are, in order.

        Where the chain ends before that, the outputs are not asked for. Returns the chain behind the block.
        """
        if self.place >= self.sets[name].ends[chain]:
            return None
        before = self._now[name][chain]
        behind = self._create(self.place + 1, name, chain, before.shape, before.dtype)
        for part in outputs:
            behind.append(part)
        self._done(name, chain, behind)
        return behind

    def _done(self, name: str, chain: str, states: States) -> None:
        self._next[name][chain] = states
        self._syncing.append(self._disk.submit(states.finish))  # the disk works while the next chain is computed

    def settle(self) -> None:
        """Wait until all that have advanced are durable."""
        for each in self._syncing:
            each.result()
        self._syncing.clear()

    def moved(self) -> None:
        """All have passed the block, and its result is durable: the files before it are no longer needed."""
        for chains in self._now.values():
            for states in chains.values():
                states.remove()
        self._now, self._next = self._next, {LEARNING: {}, CHECKING: {}}
        self.place += 1

    def close(self) -> None:
        """Let go of the files, and leave them."""
        for chains in (*self._now.values(), *self._next.values()):
            for states in chains.values():
                states.close()

    def drop(self, name: str) -> None:
        """The set is no longer needed."""
        for states in self._now[name].values():
            states.remove()
        self._now[name] = {}
