"""What the experts of a block read, and the second moments of each.

An expert sees at p bits the tokens R that the router of the model quantized so far gives it there. With their scores s
as weights, and the original's own inputs of the same tokens,

    H_routed = sum_R s x_p x_p^T / sum_R s,    C_routed = sum_R s x x_p^T / sum_R s

say what it is asked for (solvers/moments.py). Where few tokens were routed they say it badly, so they are drawn towards
what the layer reads in all, H_all and C_all, the more the fewer there are:

    H = n H_routed + k H_all,  both over n + k,     n = |R|,  k = the number of inputs of the linear

An expert without tokens is solved on the layer's inputs alone, never by rounding. What down_proj reads of the others'
tokens is what the expert itself makes of them: some of the layer's inputs pass through it.

What the experts read is in files: each process writes that of its own windows, and reads all. Memory: experts and
scores of each token, tokens x chosen experts x 8 bytes x bits, while a module's experts are solved; moments of one
expert at a time, and of the layer once, 2 x inputs^2 x 4 bytes x bits each; ROWS of inputs. Nothing grows with the
number of experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..calibration.pieces import Pieces, piece_path
from ..calibration.states import States
from ..errors import disk_errors
from ..nn import Experts
from ..scratch import ByteFile, ahead, bytes_of
from ..solvers import Moments
from .team import Team, lanes_of

ROWS = 1024  # of inputs multiplied at a time
Rows = tuple[Tensor, Tensor, Tensor | None]  # of the original, of a chain, and scores
PASSED_ON = 2  # rows of the layer's inputs, for each input of down_proj, that pass through an expert


def prior_tokens(columns: int) -> int:
    """k: as many routed tokens weigh as much as the layer's inputs."""
    return columns


def prior_share(tokens: int, columns: int) -> float:
    """How much an expert with so many tokens leans on the layer's inputs."""
    return prior_tokens(columns) / (tokens + prior_tokens(columns))


def arguments_of(experts: Experts, arguments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [T, H], of each token its experts and scores, [T, k], from the arguments of a call.

    Of presorted inputs, which contain the scores: an expert that has the token.
    """
    if len(arguments) > 1:
        x, chosen, scores = arguments
        return x.reshape(-1, x.shape[-1]), chosen, scores.float().reshape(chosen.shape)
    each = arguments[0].view(experts.expert_count, -1, arguments[0].shape[-1])  # [E, T, H]
    has = each.any(-1)  # [E, T]
    first = has.int().argmax(0)
    inputs = each.gather(0, first[None, :, None].expand(1, -1, each.shape[2]))[0]
    return inputs, first[:, None], has.any(0)[:, None].float()


@dataclass(frozen=True)
class Routed:
    """What a module of experts was called with on all windows: inputs [T, H], experts and scores of each token, [T, k].

    Inputs are read as fp32, some rows at a time.
    """

    inputs: Pieces
    chosen: Tensor
    scores: Tensor

    def rows_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens that go through `expert`, int64 [n], and their scores, [n]."""
        at, slot = ((self.chosen == expert) & (self.scores > 0)).nonzero(as_tuple=True)
        return at, self.scores[at, slot]


@dataclass
class Calls:
    """The calls of a module of experts on this process's windows, in order, and then those of all processes.

    Args:
        path: of the files; dtype: of the inputs in them.
    """

    experts: Experts
    path: Path
    dtype: torch.dtype
    team: Team
    _width: int = field(default=0, init=False)
    _read: Pieces | None = field(default=None, init=False)
    _routing: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._own = piece_path(self.path, self.team.lanes)
        with disk_errors(self._own):
            self._own.unlink(missing_ok=True)
            self._file = ByteFile(open(self._own, "w+b", buffering=0), self._own)  # noqa: SIM115  (kept open)

    def add(self, arguments: tuple[Tensor, ...]) -> None:
        """The next one."""
        inputs, chosen, scores = arguments_of(self.experts, arguments)
        self._file.append(bytes_of(inputs.to(self.dtype)))
        self._routing.append((chosen.int().cpu(), scores.cpu()))
        self._width = inputs.shape[1]

    def all(self) -> Routed:
        """Of all windows: every process asks for it."""
        own = tuple(map(torch.cat, zip(*self._routing, strict=True)))
        self._routing.clear()
        everyone = self.team.everyone((self._width, own))  # whoever answers has written all of its own
        parts, width = [], max(width for width, _ in everyone)
        for rank, (_, routing) in enumerate(everyone):
            count = len(routing[0]) if routing else 0
            path = piece_path(self.path, lanes_of(rank, self.team.size))
            parts.append(States.open(path, (count, width), self.dtype))
        chosen, scores = map(torch.cat, zip(*(routing for _, routing in everyone if routing), strict=True))
        self._read = Pieces(parts)
        return Routed(self._read, chosen, scores)

    def close(self) -> None:
        """Delete this process's file: nobody reads it any more."""
        for file in (self._file, self._read):
            if file is not None:
                file.close()
        self._own.unlink(missing_ok=True)


def expert_bytes(tokens: int, chosen: int, hidden: int, inner: int, bits: int) -> int:
    """The most that this takes in memory, at so many precisions, beside moments of one precision."""
    routing = 8 * tokens * chosen * (bits + 2)  # one of them while it is put together
    rows = 4 * ROWS * (7 * hidden + 6 * inner)  # those of two chains; the next ones are read meanwhile
    return routing + rows + 8 * hidden**2 * (bits + 1)


class ExpertMoments:
    """The moments of one module's experts, for BlockTask.

    Args:
        original, chains: what the module is called with in the original, and at each bits.
        device: where moments are computed.
    """

    def __init__(self, experts: Experts, original: Routed, chains: Mapping[int, Routed], device: torch.device) -> None:
        self.experts, self.original, self.chains, self.device = experts, original, chains, device
        self._all: dict[int, tuple[Tensor, Tensor]] = {}

    def of_inputs(self, expert: int) -> dict[int, Moments]:
        """Of what gate_proj and up_proj of `expert` read."""
        found, columns = {}, self.original.inputs.shape[1]
        for bits, chain in self.chains.items():
            if bits not in self._all:
                self._all[bits] = self._sums(columns, self._read(chain, None))
            rows, scores = chain.rows_of(expert)
            own = self._sums(columns, self._read(chain, rows, scores))
            found[bits] = self._blend(own, self._all[bits], len(rows))
        return found

    def of_inner(
        self,
        expert: int,
        weights: Mapping[str, Tensor],
        solved: Mapping[int, Mapping[str, Tensor]],
    ) -> dict[int, Moments]:
        """Of what down_proj of `expert` reads.

        weights, solved: projection -> weight [N, K] of gate_proj and up_proj, the original and at each bits.
        """
        columns = next(iter(weights.values())).shape[0]
        count = len(self.original.inputs)
        some = torch.arange(0, count, max(1, count // (PASSED_ON * columns)))
        found = {}
        for bits, chain in self.chains.items():
            rows, scores = chain.rows_of(expert)
            own, prior = (
                self._sums(
                    columns,
                    (
                        (self._inner(expert, a, weights), self._inner(expert, b, solved[bits]), part)
                        for a, b, part in self._read(chain, at, of)
                    ),
                )
                for at, of in ((rows, scores), (some, None))
            )
            found[bits] = self._blend(own, prior, len(rows))
        return found

    def _read(self, chain: Routed, rows: Tensor | None, scores: Tensor | None = None) -> Iterator[Rows]:
        """Inputs of the original and of a chain, fp32 [n, H], and scores, ROWS at a time; of all rows for None."""

        def read(at: int, end: int) -> Callable[[], Rows]:
            def some() -> Rows:
                of = slice(at, end) if rows is None else rows[at:end]
                return self.original.inputs[of], chain.inputs[of], None if scores is None else scores[at:end]

            return some

        count = len(chain.inputs) if rows is None else len(rows)
        for a, b, part in ahead(read(at, min(at + ROWS, count)) for at in range(0, count, ROWS)):
            yield a.to(self.device), b.to(self.device), None if part is None else part.to(self.device)

    def _inner(self, expert: int, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """What down_proj of `expert` reads where gate_proj and up_proj have these weights."""
        child = self.experts.get_submodule(str(expert))
        outputs = []
        for name in self.experts.projections[:-1]:
            bias = child.get_submodule(name).bias
            assert bias is None or isinstance(bias, Tensor)
            outputs.append(nn.functional.linear(x, weights[name], bias))
        return self.experts.between(*outputs)

    def _sums(self, columns: int, parts: Iterable[Rows]) -> tuple[Tensor, Tensor]:
        """H and C over these rows, weighted by scores where there are some; 0 without rows."""
        hessian, cross = torch.zeros(2, columns, columns, device=self.device)
        total = 0.0
        for a, b, scores in parts:
            weighted = b if scores is None else b * scores[:, None]
            hessian.addmm_(weighted.T, b)
            cross.addmm_(a.T, weighted)
            total += len(a) if scores is None else float(scores.sum(dtype=torch.float64))
        return hessian / max(total, 1e-30), cross / max(total, 1e-30)

    def _blend(self, own: tuple[Tensor, Tensor], prior: tuple[Tensor, Tensor], tokens: int) -> Moments:
        share = prior_share(tokens, len(own[0]))
        hessian, cross = (torch.lerp(mine, all_of, share) for mine, all_of in zip(own, prior, strict=True))
        return Moments.of(hessian, cross, len(self.original.inputs))


@contextlib.contextmanager
def counting(block: nn.Module) -> Iterator[dict[str, list[tuple[int, Tensor]]]]:
    """Experts of `block` by their names -> of each call the number of tokens, and how many each expert got, [E]."""
    calls: dict[str, list[tuple[int, Tensor]]] = {}
    with contextlib.ExitStack() as stack:
        for name, module in block.named_modules():
            if isinstance(module, Experts):
                mine = calls.setdefault(name, [])

                def hook(
                    experts: nn.Module, arguments: tuple[Tensor, ...], mine: list[tuple[int, Tensor]] = mine
                ) -> None:
                    assert isinstance(experts, Experts)
                    rows = arguments[0].shape[:-1].numel() // (1 if len(arguments) > 1 else experts.expert_count)
                    mine.append((rows, experts.tokens_of(*arguments).cpu()))

                stack.callback(module.register_forward_pre_hook(hook).remove)
        yield calls


def tokens_of_experts(calls: list[tuple[int, Tensor]], tokens: int, later: int) -> list[int]:
    """How many of `tokens` tokens each expert got, in the calls before those of `later` tokens, which come last.

    What ran before, to find something out, does not count.
    """
    total = torch.zeros_like(calls[0][1])
    for count, got in reversed(calls):
        if later > 0:
            later -= count
        elif tokens > 0:
            tokens -= count
            total += got
    found: list[int] = total.tolist()
    return found
