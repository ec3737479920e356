"""The stages of a job: the head, gradients, blocks, tuning, the final check. Each is skipped where its result is there.

The head and the embedding are quantized first, from their weights alone, so chains of hidden states begin and end in
what they will be, and methods that learn make up for it. Chains are files beside the finished blocks (chains.py), so a
resumed job goes on where the first run was, with exactly the numbers it saw. Those of held-out windows, which are
always run in fp32, have passed all blocks in the end and give the logits of the final check, without ever holding the
model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import Windows
from ..calibration.block_runner import TOKENS_PER_BATCH
from ..calibration.lanes import windows_of
from ..calibration.pieces import Pieces
from ..errors import CheckError
from ..kernels.cpu import gram_runs
from ..memory import return_free_memory
from ..metrics import Tally
from ..models import HeadLayer
from ..models.experts import experts_of
from ..planes import PlaneWeight, decode
from ..progress import Steps, log, note
from ..solvers import RTN
from ..solvers.clipped import clipped_rows
from ..solvers.grouping import join_rows, row_chunks
from ..solvers.method import Decoded, MomentsMethod
from .block_task import BlockTask
from .chains import CHECKING, LEARNING, ORIGINAL, Chains, ChainSet, baseline
from .context import Job, Prepared, Stage
from .expert_inputs import counting, tokens_of_experts
from .gradients import Gradients, sensitivity
from .moment_sums import summing_bytes
from .settings import Settings
from .tune_stage import Tune
from .work import of_blocks, of_divergence, of_experts, of_head, of_moments, of_numbers, of_solver

BASELINE = RTN()  # what the final check compares with, at each bits alone
CHUNK = 1 << 20  # weights of the head solved at a time


def stages_of(settings: Settings) -> tuple[Stage, ...]:
    """What a job with these settings does, in order."""
    method = settings.method
    return (
        *([Head()] if settings.head_bits is not None else []),
        *([Gradients()] if "gradients" in method.needs else []),
        Blocks(),
        *([Tune(method.tuning)] if method.tuning is not None else []),
        Measure(),
    )


def chain_sets(settings: Settings, windows: Windows, blocks: int) -> dict[str, ChainSet]:
    """The chains that a job with these settings carries through so many blocks."""
    method, names = settings.method, (ORIGINAL, *map(str, settings.bits))
    learning: dict[str, int] = {}
    if "inputs" in method.needs:
        learning = dict.fromkeys(names, blocks - 1)
        if method.tuning is not None or not isinstance(method, MomentsMethod):
            learning[ORIGINAL] = blocks  # what the last block, or the whole model, is to imitate
    plain = tuple(map(baseline, settings.bits)) if method != BASELINE or len(settings.bits) > 1 else ()
    return {
        LEARNING: ChainSet(learning, windows.calibration, settings.dtype),
        CHECKING: ChainSet(dict.fromkeys((*names, *plain), blocks), windows.heldout, torch.float32),
    }


class Head(Stage):
    """Quantize the head and the embedding, and measure how far they are from the original's."""

    def memory(self, prepared: Prepared) -> int:
        return 0  # a stretch of rows; the final check, which holds all of them, takes more

    def disk(self, prepared: Prepared) -> int:
        return prepared.stored_bytes(prepared.head)

    def run(self, job: Job) -> None:
        bits = job.settings.head_bits
        assert bits is not None
        for layer in job.prepared.head:
            if job.state.has(layer.role):
                log.info(f"resuming: {layer.name} is already done")
            else:
                log.info(f"quantizing {layer.name} at {bits} bits")
                parts = [clipped_rows(rows, bits, job.settings.group_size) for _, rows in self._rows(job, layer)]
                job.state.save(layer.role, {layer.name: join_rows(parts)})
            job.layer_error[layer.name] = {str(bits): self._error(job, layer, bits)}

    def _rows(self, job: Job, layer: HeadLayer) -> Iterator[tuple[slice, Tensor]]:
        """W fp32, a stretch of rows at a time."""
        source = job.prepared.source
        stored = source.stored_name(f"{layer.name}.weight")
        assert stored is not None
        for rows in row_chunks(layer.out_features, layer.in_features, CHUNK):
            yield rows, source.rows(stored, rows.start, rows.stop).to(job.settings.device).float()

    def _error(self, job: Job, layer: HeadLayer, bits: int) -> float:
        """||W - W_bits||^2 / ||W||^2."""
        (planes,) = job.state.load(layer.role, [layer.name]).values()
        wrong = total = 0.0
        for rows, part in self._rows(job, layer):
            weight = part.cpu()
            dense = decode(planes.outputs(rows.start, rows.stop), bits)
            wrong += float((dense - weight).square().sum(dtype=torch.float64))
            total += float(weight.square().sum(dtype=torch.float64))
        return wrong / max(total, 1e-30)


def _shapes(prepared: Prepared) -> list[list[tuple[int, int]]]:
    """[N, K] of the linears of each block."""
    discovery = prepared.discovery
    return [
        [(linear.out_features, linear.in_features) for linear in discovery.of_block(index)]
        for index in range(len(discovery.blocks))
    ]


class Blocks(Stage):
    """Solve all blocks, one in memory at a time."""

    divided = True

    def memory(self, prepared: Prepared) -> int:
        """A block, and the planes found; a batch in its widest linear; and the largest of these:

        its linears at one precision in fp32, and in the dtype of products; what solving them takes (`Method.memory`);
        sums of moments, and linears in the dtype of products.
        """
        settings, most = prepared.settings, 0
        moments = isinstance(settings.method, MomentsMethod) and bool(settings.method.needs)
        for shapes, held in zip(_shapes(prepared), prepared.parameter_bytes[1], strict=True):
            if shapes:
                weights, widest = sum(math.prod(shape) for shape in shapes), max(map(max, shapes))
                sums = max(summing_bytes(columns) for _, columns in shapes) if moments else 0
                solving = settings.method.memory(shapes, settings.bits, settings.seq_len)
                work = max(6 * weights, solving, sums + 2 * weights)
                found = weights * (max(settings.bits) + 2) // 8
                most = max(most, held + found + work + 12 * max(TOKENS_PER_BATCH, settings.seq_len) * widest)
        return most

    def disk(self, prepared: Prepared) -> int:
        return prepared.stored_bytes(prepared.discovery.linears)

    def operations(self, prepared: Prepared) -> dict[torch.dtype, float]:
        """Each chain passes all blocks once (passes.py), moments are summed of what linears read at each bits, and the
        method solves."""
        windows, settings = prepared.windows, prepared.settings
        if windows is None:
            return {}
        found = {torch.float32: 0.0, settings.dtype: 0.0}
        found[torch.float32] += of_solver(prepared)
        for each in chain_sets(settings, windows, len(prepared.discovery.blocks)).values():
            tokens = len(each.names) * each.tokens.numel()
            found[each.dtype] += tokens * of_blocks(prepared)
            found[torch.float32] += tokens * of_numbers(prepared)
        if isinstance(settings.method, MomentsMethod) and settings.method.needs:
            tokens, bits = windows.calibration.numel(), len(settings.bits)
            summed = settings.dtype if gram_runs(settings.device, settings.dtype) else torch.float32
            found[summed] += bits * tokens * of_moments(prepared)
            found[torch.float32] += bits * of_experts(prepared, tokens)
        return found

    def passing_disk(self, prepared: Prepared) -> int:
        """Chains before and behind a block, and what is kept of it while it is solved:

        windows x seq_len x bytes x (inputs of the original's linears + bits x (inputs of linears of different widths)),
        where the experts of a module, which read the same, count as one;
        and the files of what solving takes (`Method.disk`).
        """
        if prepared.windows is None:
            return 0
        chains = 0
        for each in chain_sets(prepared.settings, prepared.windows, len(prepared.discovery.blocks)).values():
            chains += 2 * each.tokens.numel() * prepared.hidden_size * each.dtype.itemsize * len(each.names)
        settings, kept = prepared.settings, 0
        if isinstance(settings.method, MomentsMethod) and settings.method.needs:
            experts = experts_of((linear.name for linear in prepared.discovery.linears), prepared.model)
            bits = len(settings.bits)
            for index in range(len(prepared.discovery.blocks)):
                linears = prepared.discovery.of_block(index)
                inputs = [one.in_features for one in linears if one.name not in experts]
                routed = {  # by a module of experts
                    one.name.rsplit(".", 2)[0]: one.out_features
                    for one in linears
                    if one.name in experts and one.name.endswith(".down_proj")
                }
                of_experts = sum(routed.values()) + bits * max(routed.values(), default=0)
                kept = max(kept, sum(inputs) + bits * sum(set(inputs)) + of_experts)
            kept *= prepared.windows.calibration.numel() * settings.dtype.itemsize
        return chains + kept + max(settings.method.disk(shapes, settings.bits) for shapes in _shapes(prepared))

    def run(self, job: Job) -> None:
        blocks, chains = job.discovery.blocks, job.chains
        resumed = self.begin(job)
        if resumed:
            log.info(f"resuming: {resumed} of {len(blocks)} blocks are already done")
        for index in range(resumed if job.team.leads else 0):
            self._recall(job, index)
        with Steps("quantizing", len(blocks), "block") as steps:
            for index, name in enumerate(blocks):
                if index >= chains.place:
                    began = time.monotonic()
                    self.run_block(job, index, solve=index >= resumed)
                    return_free_memory()
                    if index == resumed < len(blocks) - 1:
                        job.first_block(time.monotonic() - began)
                steps.step(name, skipped=index < resumed)
        if job.settings.method.tuning is None:
            chains.drop(LEARNING)  # nothing reads it any more

    def begin(self, job: Job) -> int:
        """Bring the chains to the first block that has to be run. Returns how many are finished."""
        count = len(job.discovery.blocks)
        finished = job.team.led(lambda: next((index for index in range(count) if not job.state.has(index)), count))
        if job.prepared.windows is None:
            job.chains.place = finished
            return finished
        sets = chain_sets(job.settings, job.windows, count)
        if finished == count and (job.settings.method.tuning is None or job.state.refined):
            del sets[LEARNING]  # nothing reads it any more
        job.chains.begin(sets, finished, job.embedding())
        return finished

    def _recall(self, job: Job, index: int) -> None:
        """Take over what was found out about a finished block."""
        facts = job.state.facts(index)
        job.layer_error.update(facts.get("layer_error", {}))
        job.routing.update(facts.get("routing", {}))
        for message in facts.get("notes", ()):
            note(message)

    def run_block(self, job: Job, index: int, *, solve: bool) -> None:
        """Move all chains past a block; `solve`: and find its planes first."""
        chains, runner = job.chains, job.runner
        with runner.block(index) as block:
            for each in (chains.learning, chains.checking):
                if each:
                    runner.probe(index, block, each[ORIGINAL])
            task = job.task(index, block)
            with counting(block) as calls:
                if chains.learning:
                    task.targets = self._original(job, task, index, block, record=solve)
                if chains.checking:
                    states = chains.checking[ORIGINAL]
                    chains.advance(CHECKING, ORIGINAL, runner.outputs(index, block, states, job.team))
            if solve:
                facts = self._routing(job, f"{job.discovery.blocks[index]}.", calls)
                planes = self._solved(job, task, index)
            else:
                facts, planes = job.state.facts(index), job.planes(index)
            for bits in job.settings.bits:
                self._advance(job, task, planes, index, bits)
                return_free_memory()
            task.close()
            facts["layer_error"] = {name: job.layer_error[name] for name in task.weights}
            chains.settle()
            if solve and job.team.leads:
                job.state.remember(index, facts)
                job.state.save(index, planes)
                job.state.drop(sensitivity(index))
            chains.moved()

    def _original(self, job: Job, task: BlockTask, index: int, block: nn.Module, *, record: bool) -> Pieces | None:
        """Move the original's learning chain past a block, and record what methods with moments ask for."""
        if record and isinstance(job.settings.method, MomentsMethod):
            outputs = task.record()
        else:
            outputs = task.originals(job.chains.learning[ORIGINAL])
        moved = job.chains.advance(LEARNING, ORIGINAL, outputs)
        for _ in outputs:  # what was not asked for is recorded all the same
            pass
        return job.chains.behind(LEARNING, ORIGINAL) if moved and job.settings.method.undivided else None

    def _advance(self, job: Job, task: BlockTask, planes: dict[str, PlaneWeight], index: int, bits: int) -> None:
        """Put a block's weights at `bits` into it, and move the chains of these bits past it."""
        chains, block, team = job.chains, task.block, job.team
        job.quantize(task, planes, bits)
        if chains.learning:
            dense = Decoded(planes, bits, job.settings.device)
            chains.advance(LEARNING, str(bits), task.advance(bits, dense))
        if not chains.checking:
            return
        chains.advance(CHECKING, str(bits), job.runner.outputs(index, block, chains.checking[str(bits)], team))
        if baseline(bits) in chains.checking:
            for name, weight in task.weights.items():
                plain = BASELINE.solve_layer(weight, (bits,), job.settings.group_size)
                task.put({name: decode(plain, bits)})
            states = chains.checking[baseline(bits)]
            chains.advance(CHECKING, baseline(bits), job.runner.outputs(index, block, states, team))

    def _routing(self, job: Job, prefix: str, calls: dict[str, list[tuple[int, Tensor]]]) -> dict[str, Any]:
        """How many tokens of the learning windows each expert got in the original, and what is to be said of that."""
        facts: dict[str, Any] = {"routing": {}, "notes": []}
        if job.chains.learning.get(ORIGINAL) is None:
            return facts
        windows = job.windows
        learning, later = (
            each[windows_of(len(each), job.team)].numel() for each in (windows.calibration, windows.heldout)
        )
        own = {name: tokens_of_experts(found, learning, later) for name, found in calls.items() if found}
        everyone = job.team.everyone(own)
        for name in calls:
            parts = [of[name] for of in everyone if name in of]
            if parts:
                tokens = list(map(sum, zip(*parts, strict=True)))
                facts["routing"][prefix + name] = tokens
                unseen = [str(expert) for expert, count in enumerate(tokens) if not count]
                if unseen:
                    facts["notes"].append(
                        f"{prefix}{name}: no token of the calibration text reached expert {', '.join(unseen)}"
                    )
        job.routing.update(facts["routing"])
        for message in facts["notes"]:
            note(message)
        return facts

    def _solved(self, job: Job, task: BlockTask, index: int) -> dict[str, PlaneWeight]:
        if "gradients" in job.settings.method.needs:
            task.sensitivity = job.state.load_tensors(sensitivity(index), list(task.weights))
        method = job.settings.method
        return job.team.led(lambda: method.solve_block(task)) if method.undivided else method.solve_block(task)


class Measure(Stage):
    """Fill `Job.measured`, with nothing if there is no text. Raises CheckError if a loss is not finite."""

    def memory(self, prepared: Prepared) -> int:
        """What lies outside the blocks, and a quantized head in fp32 and its planes."""
        # decoding needs the planes at 1 byte a weight or less
        decoded = max((5 * layer.in_features * layer.out_features for layer in prepared.head), default=0)
        return prepared.parameter_bytes[0] + decoded

    def passing_disk(self, prepared: Prepared) -> int:
        """The held-out chains; the tuned ones stand before and behind a block."""
        settings = prepared.settings
        if prepared.windows is None or settings.method.tuning is None:
            return prepared.heldout_bytes
        again = prepared.windows.heldout.numel() * prepared.hidden_size * 4 * len(settings.bits)
        return prepared.heldout_bytes + again

    def operations(self, prepared: Prepared) -> dict[torch.dtype, float]:
        """Every chain's logits and divergence; tuned scales pass the blocks first."""
        if prepared.windows is None:
            return {}
        tokens, bits = prepared.windows.heldout.numel(), len(prepared.settings.bits)
        total = (1 + 2 * bits) * (of_head(prepared) + of_divergence(prepared))
        if prepared.settings.method.tuning is not None:
            total += bits * (of_blocks(prepared) + of_numbers(prepared))
        return {torch.float32: tokens * total}

    def run(self, job: Job) -> None:
        checking: dict[str, Pieces] = job.chains.checking
        if not checking:
            return
        if job.state.refined:
            checking = {**checking, **self._run_again(job)}
        tallies = {name: Tally() for name in checking}
        for targets, logits in job.runner.logits(checking, job.windows.heldout, job.output(), original=ORIGINAL):
            for name, tally in tallies.items():
                tally.add(logits[name], targets, None if name == ORIGINAL else logits[ORIGINAL])
        measured = {name: tally.result() for name, tally in tallies.items()}
        # round-to-nearest may overflow; it is only there to compare with
        job.measured = {name: result for name, result in measured.items() if result.nll < float("inf")}
        broken = [name for name in measured if name not in job.measured and not name.startswith("rtn")]
        if broken:
            raise CheckError(
                f"the loss is not finite at {', '.join(sorted(broken))}",
                hint="the model overflows in fp32, or a weight is damaged; try another method",
            )

    def _run_again(self, job: Job) -> dict[str, Pieces]:
        """Run the held-out windows through the blocks with their tuned scales."""
        blocks, names = range(len(job.discovery.blocks)), tuple(str(bits) for bits in job.settings.bits)
        chains = Chains(job.runner, job.state.folder, "tuned-chain")
        heldout = ChainSet(dict.fromkeys(names, len(blocks)), job.windows.heldout, torch.float32)
        chains.begin({CHECKING: heldout}, 0, job.embedding())
        for index in blocks:
            with job.runner.block(index) as block:
                task, planes = job.task(index, block), job.planes(index)
                for bits in job.settings.bits:
                    job.quantize(task, planes, bits)
                    outputs = job.runner.outputs(index, block, chains.checking[str(bits)])
                    chains.advance(CHECKING, str(bits), outputs)
                chains.settle()
                chains.moved()
        return chains.checking
