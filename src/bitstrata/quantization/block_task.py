"""One transformer block in memory: what a method may ask of it, and weights put in the places of its own.

Linears that read one tensor form a group. Groups are solved in the order in which the block runs them, each on the
inputs that the quantized weights of those before it give (solvers/moments.py has the mathematics). Each expert has two
groups of its own (expert_inputs.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..calibration.block_runner import Reached
from ..errors import ModelError
from ..nn import Experts
from ..solvers import Block, Moments
from .expert_inputs import ExpertMoments, Routed, routed

WINDOWS_A_BATCH = 4

Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]


@dataclass(kw_only=True)
class BlockTask(Block):
    """A block with its module.

    Attributes:
        block: the module, fp32, with the original weights.
        prefix: its name and a dot, with which linears' names begin.
        transposed: names of linears whose parameter holds W^T.
        call: hidden [b, S, hidden] -> the block's output, differentiable in the block's parameters.
    """

    block: nn.Module
    prefix: str = ""
    transposed: frozenset[str]
    call: Callable[[nn.Module, Tensor], Tensor]
    _of_experts: tuple[str, ExpertMoments] | None = field(
        default=None, init=False
    )  # a module's name, while it is solved

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Put weights [N, K] in the places of the block's own."""
        for name, weight in weights.items():
            module = self._linear(name)
            value = (weight.T if name in self.transposed else weight).to(module.weight.device)
            module.weight = nn.Parameter(value, requires_grad=False)

    @contextlib.contextmanager
    def with_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The block with these weights [N, K], and then again with those that it had."""
        before = {name: self._linear(name).weight for name in weights}
        try:
            self.put(weights)
            yield
        finally:
            for name, parameter in before.items():
                self._linear(name).weight = parameter

    def input_groups(self) -> list[list[str]]:
        """Names of linears that read the same tensor, in the order in which the block runs them.

        Raises ModelError if a linear is never run.
        """
        assert self.inputs is not None
        found: list[list[str]] = []
        read: list[Tensor] = []  # keeps the inputs alive, so that no other can be taken for one of them

        def note(name: str) -> Hook:
            def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                if any(name in group for group in found):
                    return
                if read and read[-1] is arguments[0]:
                    found[-1].append(name)
                else:
                    found.append([name])
                    read.append(arguments[0])

            return hook

        def note_experts(module: str) -> Hook:
            def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                found.extend(group for group in self._groups_of(module) if group not in found)
                read.append(torch.empty(0))  # whoever comes next is in no group of theirs

            return hook

        experts = {name: module for name, module in self.block.named_modules() if isinstance(module, Experts)}
        hooks = {name: note(name) for name in self.weights if self._expert_of(name) is None}
        with contextlib.ExitStack() as stack, torch.no_grad():
            stack.enter_context(self._hooks(hooks))
            for name, module in experts.items():
                stack.callback(module.register_forward_pre_hook(note_experts(name)).remove)
            self.call(self.block, self.inputs[:1].to(self._device))
        missing = set(self.weights) - {name for group in found for name in group}
        if missing:
            raise ModelError(
                f"the block never runs {', '.join(sorted(missing))}, so its inputs cannot be seen",
                hint="leave the layer out with --skip, or use a method without calibration",
            )
        return found

    def moments(self, names: Sequence[str], solved: Mapping[int, Mapping[str, Tensor]]) -> dict[int, Moments]:
        assert self.inputs is not None
        first, tokens = names[0], 0
        place = self._expert_of(first)
        if place is not None:
            return self._moments_of_expert(*place, first, solved)
        columns = self.weights[first].shape[1]
        sums = {bits: torch.zeros(2, columns, columns, device=self._device) for bits in self.chains}
        for start in range(0, len(self.inputs), WINDOWS_A_BATCH):
            windows = slice(start, start + WINDOWS_A_BATCH)
            original = self._input_of(first, self.inputs[windows])
            tokens += len(original)
            for bits, chain in self.chains.items():
                with self.with_weights(solved[bits]):
                    quantized = self._input_of(first, chain[windows])
                hessian, cross = sums[bits]
                hessian.addmm_(quantized.T, quantized)
                cross.addmm_(original.T, quantized)
        return {bits: Moments(hessian / tokens, cross / tokens, tokens) for bits, (hessian, cross) in sums.items()}

    def _expert_of(self, name: str) -> tuple[str, int] | None:
        """The module of experts in the block that the linear belongs to, and which expert it is of; None if to none."""
        parent = name.removeprefix(self.prefix).rpartition(".")[0]
        module, _, expert = parent.rpartition(".")
        if not module or not expert.isdecimal() or not isinstance(self.block.get_submodule(module), Experts):
            return None
        return module, int(expert)

    def _groups_of(self, module: str) -> list[list[str]]:
        """The groups of a module's experts: of each gate_proj and up_proj, then down_proj, as far as they are ours."""
        experts = self.block.get_submodule(module)
        assert isinstance(experts, Experts)
        groups = []
        for expert in range(experts.expert_count):
            names = [f"{self.prefix}{module}.{expert}.{name}" for name in experts.projections]
            groups += [[name for name in part if name in self.weights] for part in (names[:-1], names[-1:])]
        return [group for group in groups if group]

    def _moments_of_expert(
        self, module: str, expert: int, first: str, solved: Mapping[int, Mapping[str, Tensor]]
    ) -> dict[int, Moments]:
        experts = self.block.get_submodule(module)
        assert isinstance(experts, Experts)
        assert self.inputs is not None
        if self._of_experts is None or self._of_experts[0] != module:
            chains = {}
            for bits, chain in self.chains.items():
                with self.with_weights(solved[bits]):
                    chains[bits] = self._routed(experts, chain)
            self._of_experts = module, ExpertMoments(experts, self._routed(experts, self.inputs), chains, self._device)
        moments = self._of_experts[1]
        if not first.endswith(".down_proj"):
            return moments.of_inputs(expert)
        names = {name: f"{first.rpartition('.')[0]}.{name}" for name in experts.projections[:-1]}
        original = {name: self._linear(full).weight for name, full in names.items()}
        quantized = {
            bits: {name: of.get(full, original[name]) for name, full in names.items()} for bits, of in solved.items()
        }
        return moments.of_inner(expert, original, quantized)

    @torch.no_grad()
    def _routed(self, experts: Experts, hidden: Tensor) -> Routed:
        """What the experts are called with when the block runs on `hidden`."""

        def run(part: Tensor) -> None:
            self.call(self.block, part.to(self._device))

        return routed(experts, run, hidden, WINDOWS_A_BATCH, Reached)

    def output(self, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        class Caller(nn.Module):
            def __init__(self, task: BlockTask) -> None:
                super().__init__()
                self.block = task.block
                self.call = task.call

            def forward(self, hidden: Tensor) -> Tensor:
                return self.call(self.block, hidden)

        named = {
            f"block.{name.removeprefix(self.prefix)}.weight": weight.T if name in self.transposed else weight
            for name, weight in weights.items()
        }
        output: Tensor = functional_call(Caller(self), named, (hidden,))
        return output

    @torch.no_grad()
    def _input_of(self, name: str, hidden: Tensor) -> Tensor:
        """What the linear reads when the block runs on `hidden`: fp32 [tokens, K]."""
        seen: list[Tensor] = []

        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen.append(arguments[0].reshape(-1, arguments[0].shape[-1]).float())
            raise Reached

        with self._hooks({name: hook}), contextlib.suppress(Reached):
            self.call(self.block, hidden.to(self._device))
        return seen[0]

    @contextlib.contextmanager
    def _hooks(self, hooks: Mapping[str, Hook]) -> Iterator[None]:
        handles = [self._linear(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _linear(self, name: str) -> nn.Linear:
        module = self.block.get_submodule(name.removeprefix(self.prefix))
        return cast(nn.Linear, module)  # or transformers' Conv1D

    @property
    def _device(self) -> torch.device:
        return next(iter(self.weights.values())).device
