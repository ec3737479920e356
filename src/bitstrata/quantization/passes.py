"""Passes of one chain over a block, each up to the next linears to be solved, and none of them doing a product twice.

Linears are solved group by group, and the inputs of a group are known only once those before it have their quantized
weights. So the chain's windows pass the block once a group. What a pass would repeat is left out by two facts, which
are seen when one window runs through the original block:

    a module, such as attention, may return just what its last linear makes, with nothing beside it. Once all of its
    linears are solved, the linear on its stored inputs gives what the module returns, without running the rest of it;
    what it returned in one pass is stored for those that follow.

In a block of attention and MLP each product is so made once: q, k, v and attention in the pass to the output
projection, that one in the pass to gate and up, and so on. A module that returns anything else runs anew in each pass,
as it would without all this. Everything stored is in a file without a name; a pass holds one batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.block_runner import Reached, arithmetic
from ..scratch import Scratch, ahead
from ..solvers.method import Windows

Call = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Tail:
    """A module that returns what a linear of its own makes.

    linear: its name in the block; beside: how many None follow in a tuple, None where it returns the tensor alone;
    inside: names of all linears to be solved in the module.
    """

    linear: str
    beside: int | None
    inside: frozenset[str]

    def returned(self, output: Tensor) -> Any:
        return output if self.beside is None else (output, *[None] * self.beside)


@contextlib.contextmanager
def hooked(handles: Sequence[Any]) -> Iterator[None]:
    """With these hooks, which are removed at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def finding_tails(block: nn.Module, linears: Sequence[str], dtype: torch.dtype) -> Iterator[dict[str, Tail]]:
    """Module's name -> its tail, complete once the block has run one window inside of this."""
    found: dict[str, Tail] = {}
    made: dict[int, str] = {}
    alive: list[Tensor] = []  # so that no other tensor can have the place in memory of one of them
    calls: dict[str, int] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, arguments: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if name in linears:
                if isinstance(output, Tensor) and output.dtype == dtype:
                    alive.append(output)
                    made[id(output)] = name
                return
            first, *rest = output if isinstance(output, tuple) and output else (output,)
            linear = made.get(id(first))
            if linear is not None and linear.startswith(f"{name}.") and all(value is None for value in rest):
                inside = frozenset(one for one in linears if one.startswith(f"{name}."))
                found[name] = Tail(linear, len(rest) if isinstance(output, tuple) else None, inside)

        return hook

    modules = [(name, module) for name, module in block.named_modules() if name]
    with hooked([module.register_forward_hook(note(name)) for name, module in modules]):
        yield found
    for name, tail in list(found.items()):
        outer = any(name.startswith(f"{other}.") and found[other].linear == tail.linear for other in found)
        if outer or calls[name] > 1 or calls[tail.linear] > 1:
            del found[name]


@dataclass
class Passes:
    """The passes of one chain over one block.

    Args:
        block: the module.
        call: hidden [b, S, hidden] -> the block's output.
        states: what enters the block.
        batches: which windows run together.
        tails: of the block, by the name of a module.
        device, dtype: where the block runs, and what its products are made in.
        folder: where what is kept lies.
    """

    block: nn.Module
    call: Call
    states: Windows
    batches: Sequence[slice]
    tails: Mapping[str, Tail]
    device: torch.device
    dtype: torch.dtype
    folder: Path | None
    _inputs: dict[str, Scratch] = field(default_factory=dict, init=False)  # of tails' linears
    _outputs: dict[str, Scratch] = field(default_factory=dict, init=False)  # of modules with a tail

    def _ready(self, solved: frozenset[str]) -> dict[str, Tail]:
        """The modules that need not run, where these linears are solved."""
        return {
            name: tail
            for name, tail in self.tails.items()
            if tail.inside <= solved and (name in self._outputs or tail.linear in self._inputs)
        }

    def needed(self, solved: frozenset[str]) -> frozenset[str]:
        """Which of the linears `solved` the next pass runs."""
        ready = self._ready(solved)
        left_out = {linear for tail in ready.values() for linear in tail.inside}
        return (solved - left_out) | {tail.linear for name, tail in ready.items() if name not in self._outputs}

    @torch.no_grad()
    def run(self, solved: frozenset[str], until: str | None) -> Generator[tuple[int, Any]]:
        """Run all windows through the block, whose linears `solved` have their final weights.

        Yields the number of each batch, and what the module `until` is called with there; or, for None, the block's
        output. The pass ends with the iteration.
        """
        ready = self._ready(solved)
        stored = {
            name: self._outputs[name] if name in self._outputs else self._inputs[tail.linear]
            for name, tail in ready.items()
        }
        fresh = {} if until is None else {name: self._scratch() for name in ready if name not in self._outputs}
        now: dict[str, Tensor] = {}
        seen: list[Any] = []

        def read(number: int, rows: slice) -> Callable[[], tuple[Tensor, dict[str, Tensor]]]:
            return lambda: (raw(self.states, rows), {name: of[number] for name, of in stored.items()})

        def stop(_: nn.Module, arguments: Any) -> None:
            seen.append(arguments)
            raise Reached

        with contextlib.ExitStack() as stack:
            if until is not None:
                stack.enter_context(hooked([self.block.get_submodule(until).register_forward_pre_hook(stop)]))
            for name, tail in ready.items():
                made = name in self._outputs
                stack.enter_context(self._standing_in(name, tail, now, None if made else fresh.get(name), made=made))
            reads = (read(number, rows) for number, rows in enumerate(self.batches))
            for number, (hidden, parts) in enumerate(ahead(reads)):
                now.update(parts)
                with arithmetic(self.device, self.dtype), contextlib.suppress(Reached):
                    output = self.call(self.block, hidden.to(self.device).float())
                yield number, output if until is None else seen.pop()
        for name, outputs in fresh.items():
            self._outputs[name] = outputs
            self._inputs.pop(ready[name].linear).close()

    def keeping(self, linears: Sequence[str]) -> list[Scratch]:
        """Files for what these, which read the same, read in each batch: of those in which a module ends."""
        ends = {tail.linear for tail in self.tails.values()}
        return [self._inputs.setdefault(linear, self._scratch()) for linear in linears if linear in ends]

    def close(self) -> None:
        """Let go of all that is kept."""
        for kept in (*self._inputs.values(), *self._outputs.values()):
            kept.close()
        self._inputs.clear()
        self._outputs.clear()

    def _scratch(self) -> Scratch:
        return Scratch(self.folder, self.dtype)

    @contextlib.contextmanager
    def _standing_in(
        self, name: str, tail: Tail, now: Mapping[str, Tensor], fresh: Scratch | None, *, made: bool
    ) -> Iterator[None]:
        """A module that returns what it would, from what is stored of it; what is computed also goes to `fresh`."""
        linear = self.block.get_submodule(tail.linear)

        def forward(*_: Any, **__: Any) -> Any:
            output = now[name].to(self.device)
            if not made:
                output = linear(output)
                if fresh is not None:
                    fresh.append(output)
            return tail.returned(output)

        module = self.block.get_submodule(name)
        before = module.__dict__.get("forward")
        module.__dict__["forward"] = forward
        try:
            yield
        finally:
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before


def raw(states: Windows, rows: slice) -> Tensor:
    """Some windows as they are stored."""
    as_stored: Callable[[slice], Tensor] = getattr(states, "as_stored", states.__getitem__)
    return as_stored(rows)
