"""The block loop of a job: every block solved once, every chain of hidden states moved past it.

A chain is what the model's hidden states are at one precision. There are two sets, over different
windows: `learning` (what methods train on) and `checking` (held out, for the final check). Chain
names: the original, each bits, and dedicated round-to-nearest at each bits (checking only). All but the
original begin and end in the quantized embedding and head, where these are quantized.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..calibration import BlockRunner, fisher_diagonal
from ..errors import CheckError
from ..metrics import Metrics, Tally
from ..models import LinearInfo
from ..planes import PlaneWeight, decode
from ..progress import Reporter
from .head import HeadPlanes
from .method import BlockTask
from .preflight import Prepared
from .refine import refine
from .report import ORIGINAL
from .rtn import RTN
from .state import JobState

FISHER = "fisher"  # the durable part that holds the sensitivities of all layers


class BlockLoop:
    """The block loop and the final check; holds the chains."""

    def __init__(self, prepared: Prepared, state: JobState, reporter: Reporter, head: HeadPlanes) -> None:
        self.prepared, self.state, self.reporter, self.head = prepared, state, reporter, head
        self.settings = prepared.settings
        self.runner = BlockRunner(
            prepared.source,
            prepared.model,
            prepared.discovery,
            self.settings.seq_len,
            self.settings.device,
            reporter.say,
        )
        self.layer_error: dict[str, dict[str, float]] = {}
        bits = self.settings.bits
        # chain name -> hidden states; original, then one a precision, then round-to-nearest at each
        self.learning: dict[str, Tensor] = {}
        self.checking: dict[str, Tensor] = {}
        windows = prepared.windows
        if windows is not None:
            names = [ORIGINAL, *map(str, bits)]
            if len(windows.calibration) and self.settings.method.needs_chains:
                self.learning = self._started(names, windows.calibration)
            rtn = [] if self.settings.method.name == "rtn" and len(bits) == 1 else [f"rtn {value}" for value in bits]
            self.checking = self._started([*names, *rtn], windows.heldout)

    def _started(self, names: Sequence[str], tokens: Tensor) -> dict[str, Tensor]:
        """The chains before the first block: the original's, and the others' from the embedding they will have."""
        original = quantized = self.runner.embed(tokens)
        replaced = self.head.embedding()
        if replaced:
            quantized = self.runner.embed(tokens, replaced)
        return {name: original if name == ORIGINAL else quantized for name in names}

    def run_blocks(self) -> None:
        blocks = self.prepared.discovery.blocks
        self._find_fisher()
        resumed = sum(self.state.has(index) for index in range(len(blocks)))
        if resumed:
            self.reporter.say(f"resuming: {resumed} of {len(blocks)} blocks are already done")
        with self.reporter.track("quantizing", len(blocks), "block") as steps:
            for index, name in enumerate(blocks):
                had = self.state.has(index)
                self._run_block(index)
                _return_free_memory()
                steps.step(name, skipped=had)

    def refine(self) -> None:
        """Tune the scales of all blocks together, if the method wants that."""
        tuning, windows = self.settings.method.tuning, self.prepared.windows
        if tuning is None or windows is None:
            return
        blocks = [self.prepared.discovery.of_block(index) for index in range(len(self.prepared.discovery.blocks))]
        if not self.state.refined:
            self.learning.clear()  # nothing reads it any more, and the whole model needs the room
            layers = {
                name: weight
                for index, linears in enumerate(blocks)
                for name, weight in self.state.load(index, [linear.name for linear in linears]).items()
            }
            transposed = frozenset(linear.name for linears in blocks for linear in linears if linear.transposed)
            generator = torch.Generator().manual_seed(self.settings.seed)
            fixed = {**self.head.embedding(), **self.head.output()}
            with self.reporter.track("tuning", tuning.steps, "step") as steps, self.runner.whole() as model:
                refined = refine(
                    model, layers, transposed, fixed, windows.calibration, tuning, generator, lambda: steps.step("")
                )
            for bits, (before, after) in refined.divergence.items():
                self.reporter.say(f"  {bits} bits: divergence on held-out windows {before:.4f} -> {after:.4f}")
            for index, linears in enumerate(blocks):
                chosen = {linear.name: refined.layers[linear.name] for linear in linears}
                self.state.save_refined(index, chosen)
        else:
            self.reporter.say("resuming: the scales are already tuned")
        self._replay()

    def _replay(self) -> None:
        """Run the held-out windows through the blocks as they are now."""
        assert self.prepared.windows is not None
        self.layer_error.clear()
        names = [str(bits) for bits in self.settings.bits]
        self.checking.update(self._started(names, self.prepared.windows.heldout))
        for index, name in enumerate(self.prepared.discovery.blocks):
            linears = self.prepared.discovery.of_block(index)
            with self.runner.block(index) as block:
                weights = {linear.name: _weight(block, linear, name + ".") for linear in linears}
                planes = self.state.load(index, list(weights))
                for bits in self.settings.bits:
                    self._quantize(block, linears, weights, planes, bits, name + ".")
                    self.checking[str(bits)] = self.runner.run(index, block, self.checking[str(bits)])

    def _quantize(
        self,
        block: nn.Module,
        linears: Sequence[LinearInfo],
        weights: dict[str, Tensor],
        planes: dict[str, PlaneWeight],
        bits: int,
        prefix: str,
    ) -> None:
        """Put the weights at `bits` into the block, and note how far they are from the original's."""
        for linear in linears:
            weight = weights[linear.name]
            dense = decode(planes[linear.name], bits).to(weight.device)
            error = torch.dist(dense, weight).square() / weight.norm().square().clamp_min(1e-30)
            self.layer_error.setdefault(linear.name, {})[str(bits)] = float(error)
            _set_weight(block, linear, prefix, dense)

    def _find_fisher(self) -> None:
        """Compute the sensitivities, unless an earlier run left them or all blocks are done."""
        done = all(self.state.has(index) for index in range(len(self.prepared.discovery.blocks)))
        if not self.settings.method.needs_fisher or self.state.has(FISHER) or done:
            return
        assert self.prepared.windows is not None
        windows = self.prepared.windows.calibration
        with self.reporter.track("gradients", len(windows), "window") as steps:
            source, model, discovery = self.prepared.source, self.prepared.model, self.prepared.discovery
            fisher = fisher_diagonal(source, model, discovery, windows, self.settings.device, steps.step)
        self.state.save_tensors(FISHER, fisher)

    def _run_block(self, index: int) -> None:
        linears = self.prepared.discovery.of_block(index)
        with self.runner.block(index) as block:
            prefix = self.prepared.discovery.blocks[index] + "."
            weights = {linear.name: _weight(block, linear, prefix) for linear in linears}
            targets = self._run(index, block, self.learning, ORIGINAL)
            if self.state.has(index):
                planes = self.state.load(index, list(weights))
            else:
                planes = self._solve(index, block, linears, weights, targets)
                self.state.save(index, planes)
            self._advance(index, block, linears, weights, planes, targets)

    def _solve(
        self,
        index: int,
        block: nn.Module,
        linears: Sequence[LinearInfo],
        weights: dict[str, Tensor],
        targets: Tensor | None,
    ) -> dict[str, PlaneWeight]:
        prefix = self.prepared.discovery.blocks[index] + "."
        fisher = self.state.load_tensors(FISHER, list(weights)) if self.settings.method.needs_fisher else None
        task = BlockTask(
            block=block,
            weights={name.removeprefix(prefix): weight for name, weight in weights.items()},
            transposed=frozenset(linear.name.removeprefix(prefix) for linear in linears if linear.transposed),
            bits=self.settings.bits,
            group_size=self.settings.group_size,
            call=lambda module, hidden: self.runner.call(index, module, hidden),
            inputs=self.learning.get(ORIGINAL),
            targets=targets,
            chains={bits: self.learning[str(bits)] for bits in self.settings.bits} if self.learning else {},
            generator=torch.Generator().manual_seed(self.settings.seed * 1_000_003 + index),
            say=lambda message: self.reporter.say(f"  {prefix[:-1]}: {message}"),
            fisher=None if fisher is None else {name.removeprefix(prefix): value for name, value in fisher.items()},
        )
        solved = self.settings.method.quantize_block(task)
        return {prefix + name: weight for name, weight in solved.items()}

    def _run(self, index: int, block: nn.Module, chains: dict[str, Tensor], name: str) -> Tensor | None:
        return self.runner.run(index, block, chains[name]) if name in chains else None

    def _advance(
        self,
        index: int,
        block: nn.Module,
        linears: Sequence[LinearInfo],
        weights: dict[str, Tensor],
        planes: dict[str, PlaneWeight],
        targets: Tensor | None,
    ) -> None:
        """Move every chain past this block, each with its own weights."""
        if targets is not None:
            self.learning[ORIGINAL] = targets
        prefix = self.prepared.discovery.blocks[index] + "."
        moved = self._run(index, block, self.checking, ORIGINAL)
        if moved is not None:
            self.checking[ORIGINAL] = moved
        for bits in self.settings.bits:
            self._quantize(block, linears, weights, planes, bits, prefix)
            for chains in (self.learning, self.checking):
                moved = self._run(index, block, chains, str(bits))
                if moved is not None:
                    chains[str(bits)] = moved
            if f"rtn {bits}" in self.checking:
                for linear in linears:
                    plain = RTN().quantize_layer(weights[linear.name], (bits,), self.settings.group_size)
                    _set_weight(block, linear, prefix, decode(plain, bits))
                self.checking[f"rtn {bits}"] = self.runner.run(index, block, self.checking[f"rtn {bits}"])
            _return_free_memory()

    def measure(self) -> dict[str, Metrics]:
        """Every chain on the held-out windows, by chain name; empty if there are none.

        Raises CheckError if a loss is not finite.
        """
        if not self.checking:
            return {}
        assert self.prepared.windows is not None
        tallies = {name: Tally() for name in self.checking}
        heldout, heads = self.prepared.windows.heldout, self.head.output()
        for targets, logits in self.runner.logits(self.checking, heldout, heads, original=ORIGINAL):
            for name, tally in tallies.items():
                tally.add(logits[name], targets, None if name == ORIGINAL else logits[ORIGINAL])
        measured = {name: tally.result() for name, tally in tallies.items()}
        finite = {name: result for name, result in measured.items() if result.nll < float("inf")}
        broken = [name for name in measured.keys() - finite.keys() if not name.startswith("rtn")]
        if broken:
            raise CheckError(
                f"the loss is not finite at {', '.join(sorted(broken))}",
                hint="the model overflows in fp32, or a weight is damaged; try another method",
            )
        return finite  # round-to-nearest may overflow; it is only there to compare with


def _return_free_memory() -> None:
    """Ask the C library to give freed pages back; without it a long job's heap keeps its high-water mark."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has it, and only glibc needs it
        ctypes.CDLL(None).malloc_trim(0)


def _weight(block: nn.Module, linear: LinearInfo, prefix: str) -> Tensor:
    """W [N, K] of a linear in the block, fp32."""
    parameter = block.get_submodule(linear.name.removeprefix(prefix)).weight
    assert isinstance(parameter, Tensor)
    return (parameter.T if linear.transposed else parameter).detach().contiguous()


def _set_weight(block: nn.Module, linear: LinearInfo, prefix: str, weight: Tensor) -> None:
    module = block.get_submodule(linear.name.removeprefix(prefix))
    assert isinstance(module.weight, Tensor)
    value = (weight.T if linear.transposed else weight).to(module.weight.device)
    module.weight = nn.Parameter(value, requires_grad=False)
