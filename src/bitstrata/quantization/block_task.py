"""One transformer block in memory: what a method may ask of it, and weights put in the places of its own.

Linears that read one tensor form a group. Groups are solved in the order in which the block runs them, each on the
inputs that the quantized weights of those before it give (solvers/moments.py has the mathematics). Each expert has two
groups of its own (expert_inputs.py). What the original's linears read is recorded in one pass (`record`); each chain
passes the block once a group (passes.py). Memory holds one batch of one chain, and the moments of a group.
"""

from __future__ import annotations

import collections
import contextlib
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..calibration.block_runner import arithmetic
from ..calibration.lanes import batches, lanes
from ..errors import ModelError
from ..nn import Experts
from ..scratch import Scratch, ahead
from ..solvers import Block, Moments
from ..solvers.method import Windows
from .chains import CHAIN
from .expert_inputs import Calls, ExpertMoments
from .moment_sums import MomentSums
from .passes import Passes, Tail, finding_tails, hooked, raw
from .team import Team
from .weights import Some, Widened

Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]
R = TypeVar("R")


@dataclass(kw_only=True)
class BlockTask(Block):
    """A block with its module.

    Attributes:
        block: the module, which computes in fp32, with the original weights.
        prefix: its name and a dot, with which linears' names begin.
        transposed: names of linears whose parameter holds W^T.
        call: hidden [b, S, hidden] -> the block's output, differentiable in the block's parameters.
        batch: windows that run at a time; dtype: what products are made in where nothing is differentiated.
        scratch: the folder for what is kept of the block meanwhile; None for the system's own.
        team: the processes that work on the block; each runs its own windows of `inputs` and `chains`.
    """

    block: nn.Module
    prefix: str = ""
    transposed: frozenset[str]
    call: Callable[[nn.Module, Tensor], Tensor]
    batch: int = 4
    dtype: torch.dtype = torch.float32
    scratch: Path | None = None
    team: Team = field(default_factory=Team)
    _of_experts: tuple[str, ExpertMoments] | None = field(
        default=None, init=False
    )  # a module's name, while it is solved
    _recorded: dict[str, Scratch] | None = field(default=None, init=False)  # by the first linear of a group
    _calls: dict[str, Calls] = field(default_factory=dict, init=False)  # of the original, by a module of experts
    _passes: dict[int, Passes] = field(default_factory=dict, init=False)  # of each chain
    _files: list[Calls] = field(default_factory=list, init=False)  # of `_of_experts`

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Put weights [N, K] in the places of the block's own."""
        for name, weight in weights.items():
            module = self._linear(name)
            value = (weight.T if name in self.transposed else weight).to(module.weight.device)
            module.weight = nn.Parameter(value, requires_grad=False)

    @contextlib.contextmanager
    def with_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The block with these weights [N, K] in the dtype of products, and then again with those that it had."""
        before = {name: self._linear(name).weight for name in weights}
        try:
            for name in weights:  # one at a time, because they may be made when they are asked for
                self.put({name: weights[name].to(self.dtype)})
            yield
        finally:
            for name, parameter in before.items():
                self._linear(name).weight = parameter

    def input_groups(self) -> list[list[str]]:
        """Names of linears that read the same tensor, in the order in which the block runs them.

        Raises ModelError if a linear is never run.
        """
        return self._structure[0]

    def each(self, costs: Sequence[float], work: Callable[[int], R], /) -> list[R]:
        return self.team.each(costs, work)

    def strands(self) -> list[list[list[list[str]]]]:
        """Each expert of a module is a strand of its own."""
        steps: list[list[list[list[str]]]] = []
        before: tuple[str, int] | None = None
        for names in self.input_groups():
            place = self._expert_of(names[0])
            if place is None or before is None or place[0] != before[0]:
                steps.append([[names]])
            elif place == before:
                steps[-1][-1].append(names)
            else:
                steps[-1].append([names])
            before = place
        return steps

    def reach(self, names: Sequence[str], solved: Mapping[int, Mapping[str, Tensor]]) -> None:
        place = self._expert_of(names[0])
        if place is not None:
            self._experts_of(place[0], solved)

    @cached_property
    def _structure(self) -> tuple[list[list[str]], dict[str, Tail]]:
        """The groups, and the modules that end in a linear, by one window."""
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

        single = [name for name in self.weights if self._expert_of(name) is None]
        local = [name.removeprefix(self.prefix) for name in single]
        with contextlib.ExitStack() as stack, torch.no_grad():
            handles = [self._linear(name).register_forward_pre_hook(note(name)) for name in single]
            handles += [
                module.register_forward_pre_hook(note_experts(name)) for name, module in self._experts().items()
            ]
            stack.enter_context(hooked(handles))
            tails = stack.enter_context(finding_tails(self.block, local, self.dtype))
            stack.enter_context(arithmetic(self._device, self.dtype))
            self.call(self.block, self.inputs[:1].to(self._device))
        missing = set(self.weights) - {name for group in found for name in group}
        if missing:
            raise ModelError(
                f"the block never runs {', '.join(sorted(missing))}, so its inputs cannot be seen",
                hint="leave the layer out with --skip, or use a method without calibration",
            )
        return found, tails

    def _experts(self) -> dict[str, Experts]:
        """The modules of experts with linears to be solved, by their names in the block."""
        return {
            name: module
            for name, module in self.block.named_modules()
            if isinstance(module, Experts) and self._groups_of(name)
        }

    @torch.no_grad()
    def record(self) -> Iterator[Tensor]:
        """Run the original on this process's windows, and record what the first linear of each group reads.

        Yields the block's output, a batch at a time, [b, S, hidden].
        """
        assert self.inputs is not None
        firsts = [group[0] for group in self.input_groups() if self._expert_of(group[0]) is None]
        recorded = self._recorded = {name: Scratch(self.scratch, self.dtype) for name in firsts}
        self._calls = {name: self._calls_of(name, "original") for name in self._experts()}

        def note(name: str) -> Hook:
            return lambda _, arguments: recorded[name].append(arguments[0])

        def note_routed(name: str) -> Hook:
            return lambda _, arguments: self._calls[name].add(arguments)

        handles = [self._linear(name).register_forward_pre_hook(note(name)) for name in firsts]
        handles += [module.register_forward_pre_hook(note_routed(name)) for name, module in self._experts().items()]
        with hooked(handles):
            yield from self.originals(self.inputs)

    def originals(self, states: Windows) -> Iterator[Tensor]:
        """The block's output on `states` with its own weights, a batch at a time."""
        return self.outputs(self.weights.stored if isinstance(self.weights, Widened) else self.weights, states)

    @torch.no_grad()
    def outputs(self, weights: Mapping[str, Tensor], states: Windows) -> Iterator[Tensor]:
        """The block's output on this process's part of `states` with these weights [N, K], a batch at a time."""
        reads = [lambda rows=rows: raw(states, rows) for rows in batches(len(states), self.batch, self.team)]
        with self.with_weights(weights):
            for hidden in ahead(reads):
                with arithmetic(self._device, self.dtype):
                    output = self.call(self.block, hidden.to(self._device).float())
                yield output

    def moments(self, names: Sequence[str], solved: Mapping[int, Mapping[str, Tensor]]) -> dict[int, Moments]:
        first = names[0]
        if self._recorded is None:
            collections.deque(self.record(), maxlen=0)
        assert self._recorded is not None
        place = self._expert_of(first)
        if place is not None:
            return self._moments_of_expert(*place, first, solved)
        assert self.inputs is not None
        originals, columns = self._recorded.pop(first), self.weights[first].shape[1]
        found = {}
        for bits in self.chains:
            sums = MomentSums(columns, self._device, self.scratch, self.team)
            for pairs in self._readings(bits, names, solved[bits], originals, len(sums.panels)):
                for lane in lanes(len(self.inputs), self.batch, self.team):
                    for _ in lane:
                        original, quantized = next(pairs)
                        sums.add(original.flatten(0, -2), quantized.flatten(0, -2))
                    sums.end_lane()
                sums.end_panel()
            found[bits] = sums.result()
        originals.close()
        return found

    def _readings(
        self, bits: int, names: Sequence[str], weights: Mapping[str, Tensor], originals: Scratch, count: int
    ) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """So many times what `names` read in the original and on a chain, a batch at a time; the first is a pass."""
        local = [name.removeprefix(self.prefix) for name in names]
        files = self._passes_of(bits).keeping(local)
        own = [Scratch(self.scratch, self.dtype)] if count > 1 and not files else []

        def passing() -> Generator[tuple[Tensor, Tensor]]:
            for number, arguments in self._pass(bits, weights, local[0]):
                quantized = arguments[0].to(self.dtype)
                for file in (*files, *own):
                    file.append(quantized)
                yield originals[number].to(self._device), quantized

        with contextlib.closing(passing()) as first:
            yield first
            for _ in first:  # lets the pass end
                raise AssertionError
        for _ in range(1, count):
            stored = zip(originals, (*files, *own)[0], strict=True)
            yield ((one.to(self._device), other.to(self._device)) for one, other in stored)
        for file in own:
            file.close()

    def advance(self, bits: int, weights: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """The block's output with its quantized weights [N, K] on the chain of `bits`, a batch at a time."""
        for _, output in self._pass(bits, weights, None):
            yield output
        self._passes.pop(bits).close()

    def _pass(self, bits: int, weights: Mapping[str, Tensor], until: str | None) -> Generator[tuple[int, Any]]:
        """`Passes.run` on the chain of `bits`, with these weights [N, K] of the linears that are solved."""
        passes = self._passes_of(bits)
        solved = frozenset(name.removeprefix(self.prefix) for name in weights)
        needed = {f"{self.prefix}{name}" for name in passes.needed(solved)}
        with self.with_weights(Some(weights, needed)):
            yield from passes.run(solved, until)

    def _passes_of(self, bits: int) -> Passes:
        if bits not in self._passes:
            chain = self.chains[bits]
            self._passes[bits] = Passes(
                self.block,
                self.call,
                chain,
                batches(len(chain), self.batch, self.team),
                self._tails,
                self._device,
                self.dtype,
                self.scratch,
            )
        return self._passes[bits]

    @property
    def _tails(self) -> dict[str, Tail]:
        """None where the block's structure was never asked for: a pass then runs all of it."""
        return self.__dict__["_structure"][1] if "_structure" in self.__dict__ else {}

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
        moments = self._experts_of(module, solved)
        experts = moments.experts
        if not first.endswith(".down_proj"):
            return moments.of_inputs(expert)
        names = {name: f"{first.rpartition('.')[0]}.{name}" for name in experts.projections[:-1]}
        original = {name: self._linear(full).weight.float() for name, full in names.items()}
        quantized = {
            bits: {name: of.get(full, original[name]) for name, full in names.items()} for bits, of in solved.items()
        }
        return moments.of_inner(expert, original, quantized)

    def _experts_of(self, module: str, solved: Mapping[int, Mapping[str, Tensor]]) -> ExpertMoments:
        """What the experts of a module read, on all windows: the first time every process asks for it."""
        if self._of_experts is None or self._of_experts[0] != module:
            if self._recorded is None:
                collections.deque(self.record(), maxlen=0)
            self._leave_experts()
            calls = {0: self._calls.pop(module)}
            for bits in self.chains:
                calls[bits] = self._calls_of(module, str(bits))
                for _, arguments in self._pass(bits, solved[bits], module):
                    calls[bits].add(arguments)
            original, *chains = (each.all() for each in calls.values())
            moments = ExpertMoments(
                calls[0].experts, original, dict(zip(self.chains, chains, strict=True)), self._device
            )
            self._of_experts = module, moments
            self._files = list(calls.values())
        return self._of_experts[1]

    def _calls_of(self, module: str, chain: str) -> Calls:
        experts = self.block.get_submodule(module)
        assert isinstance(experts, Experts)
        name = f"{CHAIN}-experts-{self.prefix}{module}-{chain}"  # what an ended job leaves goes with its chains
        return Calls(experts, Path(self._folder) / name, self.dtype, self.team)

    @cached_property
    def _folder(self) -> str:
        if self.scratch is not None:
            return str(self.scratch)
        self._temporary = tempfile.TemporaryDirectory()
        return self._temporary.name

    def _leave_experts(self) -> None:
        """The files of a module's experts are no longer needed: every process asks for it."""
        if self._files:
            self.team.wait()
        for each in self._files:
            each.close()
        self._files, self._of_experts = [], None

    def close(self) -> None:
        """Let go of all that is kept: every process asks for it."""
        self._leave_experts()
        for calls in self._calls.values():
            calls.close()
        for passes in self._passes.values():
            passes.close()

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

    def _linear(self, name: str) -> nn.Linear:
        module = self.block.get_submodule(name.removeprefix(self.prefix))
        return cast(nn.Linear, module)  # or transformers' Conv1D

    @property
    def _device(self) -> torch.device:
        return next(self.block.parameters()).device
