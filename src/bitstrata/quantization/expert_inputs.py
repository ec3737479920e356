"""What the experts of a block read, and the second moments of each.

An expert sees at p bits the tokens R that the router of the model quantized so far gives it there. With their scores s
as weights, and the original's own inputs of the same tokens,

    H_routed = sum_R s x_p x_p^T / sum_R s,    C_routed = sum_R s x x_p^T / sum_R s

say what it is asked for (solvers/moments.py). Where few tokens were routed they say it badly, so they are drawn towards
what the layer reads in all, H_all and C_all, the more the fewer there are:

    H = n H_routed + k H_all,  both over n + k,     n = |R|,  k = the number of inputs of the linear

An expert without tokens is solved on the layer's inputs alone, never by rounding. What down_proj reads of the others'
tokens is what the expert itself makes of them: some of the layer's inputs pass through it.

Memory: the inputs of the experts, tokens x hidden x 4 bytes x (1 + bits), kept while a module's experts are solved;
moments exist of one expert at a time, and of the layer once: 2 x inputs^2 x 4 bytes x bits each. Nothing grows with the
number of experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn import Experts
from ..solvers import Moments

ROWS = 4096  # of inputs multiplied at a time
PASSED_ON = 2  # rows of the layer's inputs, for each input of down_proj, that pass through an expert


def prior_tokens(columns: int) -> int:
    """k: as many routed tokens weigh as much as the layer's inputs."""
    return columns


def prior_share(tokens: int, columns: int) -> float:
    """How much an expert with so many tokens leans on the layer's inputs."""
    return prior_tokens(columns) / (tokens + prior_tokens(columns))


@dataclass(frozen=True)
class Routed:
    """What a module of experts was called with: inputs fp32 [T, H], of each token its experts and scores, [T, k]."""

    inputs: Tensor
    chosen: Tensor
    scores: Tensor

    @classmethod
    def of(cls, experts: Experts, arguments: tuple[Tensor, ...]) -> Routed:
        """From the arguments of a call; of presorted inputs, which contain the scores, an expert that has the token."""
        if len(arguments) > 1:
            x, chosen, scores = arguments
            return cls(x.reshape(-1, x.shape[-1]).float(), chosen, scores.float().reshape(chosen.shape))
        each = arguments[0].view(experts.expert_count, -1, arguments[0].shape[-1]).float()  # [E, T, H]
        has = each.any(-1)  # [E, T]
        first = has.int().argmax(0)
        inputs = each.gather(0, first[None, :, None].expand(1, -1, each.shape[2]))[0]
        return cls(inputs, first[:, None], has.any(0)[:, None].float())

    @classmethod
    def join(cls, parts: Sequence[Routed]) -> Routed:
        """Calls in order, as one."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "chosen", "scores")))

    def cpu(self) -> Routed:
        return Routed(self.inputs.cpu(), self.chosen.cpu(), self.scores.cpu())

    def rows_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens that go through `expert`, int64 [n], and their scores, [n]."""
        at, slot = ((self.chosen == expert) & (self.scores > 0)).nonzero(as_tuple=True)
        return at, self.scores[at, slot]


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
        found = {}
        for bits, chain in self.chains.items():
            if bits not in self._all:
                self._all[bits] = self._sums(self.original.inputs, chain.inputs, None)
            rows, scores = chain.rows_of(expert)
            own = self._sums(self.original.inputs[rows], chain.inputs[rows], scores)
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
        step = max(1, count // (PASSED_ON * columns))
        some = torch.arange(0, count, step)
        found = {}
        for bits, chain in self.chains.items():
            rows, scores = chain.rows_of(expert)
            own, prior = (
                self._sums(
                    self._inner(expert, self.original.inputs[at], weights),
                    self._inner(expert, chain.inputs[at], solved[bits]),
                    of,
                )
                for at, of in ((rows, scores), (some, None))
            )
            found[bits] = self._blend(own, prior, len(rows))
        return found

    def _inner(self, expert: int, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """What down_proj of `expert` reads where gate_proj and up_proj have these weights."""
        child = self.experts.get_submodule(str(expert))
        parts = []
        for part in x.split(ROWS):
            outputs = []
            for name in self.experts.projections[:-1]:
                bias = child.get_submodule(name).bias
                assert bias is None or isinstance(bias, Tensor)
                outputs.append(nn.functional.linear(part.to(self.device), weights[name], bias))
            parts.append(self.experts.between(*outputs))
        return torch.cat(parts) if parts else x.new_empty(0, next(iter(weights.values())).shape[0])

    def _sums(self, x: Tensor, quantized: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        """H and C over these rows, weighted by `scores`; 0 where there are none."""
        columns = x.shape[-1]
        hessian, cross = torch.zeros(2, columns, columns, device=self.device)
        total = 0.0
        for start in range(0, len(x), ROWS):
            rows = slice(start, start + ROWS)
            a, b = x[rows].to(self.device), quantized[rows].to(self.device)
            weighted = b if scores is None else b * scores[rows, None].to(self.device)
            hessian.addmm_(weighted.T, b)
            cross.addmm_(a.T, weighted)
            total += len(a) if scores is None else float(scores[rows].sum(dtype=torch.float64))
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
