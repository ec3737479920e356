"""What a method is: a frozen dataclass whose fields are its options, and a way from weights to planes.

A method that looks at rows implements `solve_rows`, one that looks at a layer `solve_layer`, one that needs more of a
block than its weights `solve_block`; `MomentsMethod` solves layer by layer with the moments of their inputs (`solve`).
The job asks for what `needs` names, and knows nothing else about a method.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from ..planes import decode
from ..planes.weights import Kind, PlaneWeight
from .grouping import check_weight, join_rows, row_chunks
from .metric import ROWS_AT_ONCE, solving_bytes, solving_disk, stretches
from .moments import Moments

ROW_BUDGET = 1 << 21  # weights solved at a time by methods that look at rows
DOUBLE = 2  # what an operation in float64 counts as
A_ROUND = 9000.0  # what choosing a weight's code at one precision, and fitting its group, counts as: bound by memory
ROWS_APART, MOST_PARTS = 128, 8  # on a CPU rows are solved in so many parts at most, of at least so many rows

R = TypeVar("R")

# inputs: `inputs`, `targets` and `chains` of a block; gradients: its `sensitivity`
Need = Literal["inputs", "gradients"]


@dataclass(frozen=True)
class Tuning:
    """How all scales are tuned end to end once every block is solved.

    steps: of Adam; learning_rate: in units of a layer's last scale; batch_tokens: tokens a step.
    """

    steps: int
    learning_rate: float
    batch_tokens: int


class Each(Protocol):
    """Does pieces of work that need nothing of each other, which several processes may divide by their costs."""

    def __call__(self, costs: Sequence[float], work: Callable[[int], R], /) -> list[R]:
        """What `work` returns for every index of `costs`, in order."""
        ...


def in_turn(costs: Sequence[float], work: Callable[[int], R], /) -> list[R]:
    """One after the other, here."""
    return [work(index) for index in range(len(costs))]


def row_parts(rows: int, device: torch.device) -> Sequence[slice]:
    """The rows of a layer that are solved together, whoever does it.

    They are fixed by the shape: how a product is rounded may depend on how many rows it has. On a GPU a part takes
    about as long whatever its size, so there are few.
    """
    parts = 1 if device.type != "cpu" else MOST_PARTS
    while parts > 1 and rows < parts * ROWS_APART:
        parts //= 2
    return row_chunks(rows, 1, min(ROWS_AT_ONCE, -(-rows // parts)))


def row_pieces(weight: Tensor) -> list[tuple[int, slice]]:
    """The parts of the rows of W [N, K]: in which of its `stretches` (metric.py) each lies, and its rows there."""
    return [
        (number, part)
        for number, rows in enumerate(stretches(*weight.shape))
        for part in row_parts(rows.stop - rows.start, weight.device)
    ]


class Windows(Protocol):
    """Hidden states [n, S, hidden] of n windows: a tensor, or a file of which some windows are read at a time."""

    @property
    def shape(self) -> torch.Size: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | Tensor) -> Tensor: ...


@dataclass(kw_only=True)
class Block(ABC):
    """One transformer block, ready to be quantized.

    Attributes:
        weights: linear's name -> W fp32 [N, K].
        bits: the bits asked for, ascending; group_size: columns a group.
        inputs: the original model's hidden states [n, S, hidden]; None if the method does not need them.
        targets: the block's output on `inputs`.
        chains: bits -> the hidden states that the model quantized so far has at these bits.
        sensitivity: linear's name -> sensitivity of the loss to each weight, fp32 [N, K], if the method needs it.
        generator: the block's own source of randomness.
        say: where to report.
    """

    weights: Mapping[str, Tensor]
    bits: tuple[int, ...]
    group_size: int
    inputs: Windows | None
    targets: Windows | None
    chains: Mapping[int, Windows]
    sensitivity: Mapping[str, Tensor] | None = None
    generator: torch.Generator
    say: Callable[[str], None]

    @abstractmethod
    def input_groups(self) -> list[list[str]]:
        """Names of linears that read the same tensor, in the order in which the block runs them."""

    @abstractmethod
    def moments(self, names: Sequence[str], solved: Mapping[int, Mapping[str, Tensor]]) -> dict[int, Moments]:
        """The moments of what `names` read at each bits, where linears in `solved[bits]` have those weights [N, K]."""

    def each(self, costs: Sequence[float], work: Callable[[int], R], /) -> list[R]:
        """What `work` returns for every index of `costs`; several processes may divide it (`Each`)."""
        return in_turn(costs, work)

    def strands(self) -> list[list[list[list[str]]]]:
        """The input groups in order, those that need nothing of each other side by side:

        steps; in each, strands that may be solved in any order; in a strand, groups that follow each other.
        """
        return [[[names]] for names in self.input_groups()]

    def reach(self, names: Sequence[str], solved: Mapping[int, Mapping[str, Tensor]]) -> None:  # noqa: B027
        """Strands come next that begin with linear `names[0]`: find out what all of them need for their moments."""

    @abstractmethod
    def output(self, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """The block's output on hidden [b, S, hidden] with these weights [N, K], differentiable in them."""


@dataclass(frozen=True)
class Method(ABC):
    """A way to make planes and scales from weights; its fields are its options, each with a default.

    Class attributes:
        name: as in `--method`.
        presets: preset name -> options that differ from the defaults.
        nests: whether one file can hold several precisions.
    """

    name: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    nests: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[Need]:
        """What these options need of a block besides its weights."""
        return frozenset()

    @property
    def tuning(self) -> Tuning | None:
        """How scales are tuned once every block is solved; None to leave them."""
        return None

    @property
    def undivided(self) -> bool:
        """Whether one process has to solve a block by itself, because it trains on all windows in one order."""
        return False

    @property
    def needs_calibration(self) -> bool:
        """Whether these options need calibration text."""
        return bool(self.needs or self.tuning)

    def scales_kind(self, bits: tuple[int, ...]) -> Kind:
        """What a layer with these bits is decoded with."""
        return "affine"

    def memory(self, shapes: Sequence[tuple[int, int]], bits: tuple[int, ...], seq_len: int) -> int:
        """Bytes that solving a block with linears [N, K] of these shapes takes beyond the block itself, estimated."""
        return 0

    def operations(self, rows: int, columns: int, bits: tuple[int, ...]) -> float:
        """Multiplications and additions in fp32 that solving a linear [N, K] takes, estimated; 0 where that is little.

        Columns that several linears read count once: rows are those of all of them.
        """
        return 0.0

    def learnt_tokens(self, seq_len: int, bits: tuple[int, ...]) -> int:
        """Tokens that each block is differentiated on."""
        return 0

    def disk(self, shapes: Sequence[tuple[int, int]], bits: tuple[int, ...]) -> int:
        """Bytes of the scratch files that it takes meanwhile."""
        return 0

    def solve_rows(self, weight: Tensor, bits: tuple[int, ...], group_size: int) -> PlaneWeight:
        """`solve_layer` for some rows: W fp32 [n, K], checked."""
        raise TypeError(f"{self.name} works on whole blocks, not on single layers")

    def solve_layer(self, weight: Tensor, bits: tuple[int, ...], group_size: int) -> PlaneWeight:
        """W [N, K] -> planes and scales for each of `bits`.

        Rows are independent, so they are solved in chunks that bound the memory. Raises ModelError
        for NaN, infinity, or weights beyond the range of fp16 scales.
        """
        check_weight("a weight", weight)
        chunks = row_chunks(len(weight), weight.shape[1], ROW_BUDGET)
        return join_rows([self.solve_rows(weight[rows].float(), bits, group_size) for rows in chunks])

    def solve_block(self, block: Block) -> dict[str, PlaneWeight]:
        """A PlaneWeight for every linear of the block, on the CPU."""
        return self.solve_apart(block, lambda name: self.solve_layer(block.weights[name], block.bits, block.group_size))

    def solve_apart(self, block: Block, solve: Callable[[str], PlaneWeight]) -> dict[str, PlaneWeight]:
        """`solve` of the name of every linear of the block, which need nothing of each other."""
        names = list(block.weights)
        found = block.each([block.weights[name].numel() for name in names], lambda index: solve(names[index]))
        return dict(zip(names, found, strict=True))


class Decoded(Mapping[str, Tensor]):
    """The weights [N, K] of layers at `bits`, decoded when they are asked for, on `device`."""

    def __init__(self, layers: Mapping[str, PlaneWeight], bits: int, device: torch.device) -> None:
        self._layers, self._bits, self._device = layers, bits, device

    def __getitem__(self, name: str) -> Tensor:
        return decode(self._layers[name], self._bits).to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


@dataclass(frozen=True)
class MomentsMethod(Method):
    """Solves the linears of a block in the order in which they run, each on the inputs that the solved ones give it."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"inputs"})

    def memory(self, shapes: Sequence[tuple[int, int]], bits: tuple[int, ...], seq_len: int) -> int:
        """`solving_bytes` of the linears of one width, which are solved together at most."""
        return self._largest(solving_bytes, shapes, bits)

    def disk(self, shapes: Sequence[tuple[int, int]], bits: tuple[int, ...]) -> int:
        return self._largest(solving_disk, shapes, bits)

    def _largest(
        self, taken: Callable[[int, int, int], int], shapes: Sequence[tuple[int, int]], bits: tuple[int, ...]
    ) -> int:
        rows: dict[int, int] = {}
        for count, columns in shapes if self.needs else ():
            rows[columns] = rows.get(columns, 0) + count
        return max((taken(count, columns, len(bits)) for columns, count in rows.items()), default=0)

    def rounds(self) -> tuple[int, int]:
        """How often a weight's code is chosen, and how many products of the weights with H are made."""
        return 1, 1

    def operations(self, rows: int, columns: int, bits: tuple[int, ...]) -> float:
        """Of each precision: the factor of H, the corrected target, products with H, and rounds over the codes."""
        if not self.needs:
            return 0.0
        rounds, products = self.rounds()
        dense = DOUBLE * (4 / 3 * columns**3 + 4 * rows * columns**2) + 2.0 * products * rows * columns**2
        return len(bits) * (dense + A_ROUND * rounds * rows * columns)

    @abstractmethod
    def solve(self, weight: Tensor, found: Mapping[int, Moments], group_size: int, each: Each = in_turn) -> PlaneWeight:
        """W fp32 [N, K], checked, and the moments of its inputs at each bits -> planes and scales.

        `each` does the parts of the rows (`row_parts`).
        """

    def solve_block(self, block: Block) -> dict[str, PlaneWeight]:
        if not self.needs:
            return super().solve_block(block)
        result: dict[str, PlaneWeight] = {}
        device = next(iter(block.weights.values())).device
        solved = {bits: Decoded(result, bits, device) for bits in block.bits}

        def solve(strand: Sequence[Sequence[str]], each: Each) -> dict[str, PlaneWeight]:
            found: dict[str, PlaneWeight] = {}
            for names in strand:
                found |= self._solve_group(block, names, solved, each)
                result.update(found)
            return found

        for strands in block.strands():
            if len(strands) == 1:
                solve(strands[0], block.each)
                continue
            block.reach(strands[0][0], solved)
            costs = [sum(block.weights[name].numel() for names in strand for name in names) for strand in strands]
            for found in block.each(costs, lambda index, strands=strands: solve(strands[index], in_turn)):  # type: ignore[misc]
                result.update(found)
        return {name: result[name] for name in block.weights}

    def _solve_group(
        self, block: Block, names: Sequence[str], solved: Mapping[int, Mapping[str, Tensor]], each: Each
    ) -> dict[str, PlaneWeight]:
        found = block.moments(names, solved)
        tokens, columns = found[max(found)].tokens, block.weights[names[0]].shape[1]
        for name in names:
            check_weight(name, block.weights[name])
            if tokens < columns:
                block.say(
                    f"{name}: {tokens} calibration tokens for {columns} inputs; "
                    "damping fills in, more tokens would be better"
                )
        # rows are independent, so what reads the same inputs is solved as one layer
        spans = list(itertools.pairwise(itertools.accumulate((len(block.weights[name]) for name in names), initial=0)))
        weight = torch.empty(spans[-1][1], columns, device=block.weights[names[0]].device)
        for name, (start, end) in zip(names, spans, strict=True):
            weight[start:end] = block.weights[name]
        whole = self.solve(weight, found, block.group_size, each)
        return {name: whole.outputs(start, end) for name, (start, end) in zip(names, spans, strict=True)}
