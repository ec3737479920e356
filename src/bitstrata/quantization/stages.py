"""The stages of a job: the head, gradients, blocks, tuning, the final check. Each is skipped where its result is there.

The head and the embedding are quantized first, from their weights alone, so chains of hidden states begin and end in
what they will be, and methods that learn make up for it. An interrupted job recomputes the chains from its finished
blocks, so a resumed job sees exactly the numbers the first run saw. The chains that have passed the blocks give the
logits of the final check, without ever holding the model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..calibration import fisher_bytes, fisher_diagonal
from ..errors import CheckError
from ..memory import return_free_memory
from ..metrics import Tally
from ..models import HeadLayer
from ..planes import PlaneWeight, decode
from ..progress import Steps, log, note
from ..solvers import RTN
from ..solvers.clipped import clipped_rows
from ..solvers.grouping import join_rows, row_chunks
from .block_task import BlockTask
from .chains import ORIGINAL, baseline
from .context import Job, Prepared, Stage
from .expert_inputs import counting, tokens_of_experts
from .settings import Settings
from .state import SENSITIVITY
from .tune_stage import Tune

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


class Gradients(Stage):
    """Compute the sensitivities (calibration/fisher.py), unless all that reads them is done."""

    needs = frozenset({"windows", "whole model"})

    def memory(self, prepared: Prepared) -> int:
        return fisher_bytes(prepared.model, prepared.discovery, prepared.settings.seq_len)

    def disk(self, prepared: Prepared) -> int:
        return 4 * prepared.discovery.weight_count

    def operations(self, prepared: Prepared) -> dict[torch.dtype, float]:
        """A window runs forward and backward, which is two."""
        shares = prepared.shares
        a_token = sum(2 * one.in_features * one.out_features * shares[one.name] for one in prepared.discovery.linears)
        return {torch.float32: 3 * a_token * prepared.settings.num_samples * prepared.settings.seq_len}

    def run(self, job: Job) -> None:
        if job.state.has(SENSITIVITY) or all(map(job.state.has, range(len(job.discovery.blocks)))):
            return
        windows = job.windows.calibration
        with Steps("gradients", len(windows), "window") as steps:
            job.state.save_tensors(SENSITIVITY, fisher_diagonal(job.runner, windows, steps.step))


class Blocks(Stage):
    """Solve all blocks, one in memory at a time."""

    def memory(self, prepared: Prepared) -> int:
        """The largest block in fp32 x 4, and what solving a block takes (`Method.memory`)."""
        settings, discovery = prepared.settings, prepared.discovery
        shapes = [
            [(linear.out_features, linear.in_features) for linear in discovery.of_block(index)]
            for index in range(len(discovery.blocks))
        ]
        solving = max(settings.method.memory(found, settings.bits, settings.seq_len) for found in shapes if found)
        return 4 * max(prepared.parameter_bytes[1]) + solving

    def disk(self, prepared: Prepared) -> int:
        return prepared.stored_bytes(prepared.discovery.linears)

    def operations(self, prepared: Prepared) -> dict[torch.dtype, float]:
        """Every chain runs through all linears, and once more for what each of them reads; two moments of that."""
        windows, settings = prepared.windows, prepared.settings
        if windows is None:
            return {}
        learning, checking = (float(part.numel()) for part in (windows.calibration, windows.heldout))
        bits, linears = len(settings.bits), prepared.discovery.linears
        a_token = sum(2 * one.in_features * one.out_features * prepared.shares[one.name] for one in linears)
        total = a_token * checking * (1 + 2 * bits)
        if "inputs" in settings.method.needs:
            total += a_token * learning * (1 + bits) * 2
            read = {(one.name.rpartition(".")[0], one.in_features): prepared.shares[one.name] for one in linears}
            total += sum(4 * width**2 * share for (_, width), share in read.items()) * learning * bits
        return {torch.float32: total}

    def run(self, job: Job) -> None:
        blocks = job.discovery.blocks
        self._start_chains(job)
        resumed = sum(map(job.state.has, range(len(blocks))))
        if resumed:
            log.info(f"resuming: {resumed} of {len(blocks)} blocks are already done")
        with Steps("quantizing", len(blocks), "block") as steps:
            for index, name in enumerate(blocks):
                finished = job.state.has(index)
                self._run_block(job, index)
                return_free_memory()
                steps.step(name, skipped=finished)
        for name in job.chains.learning.keys() - ({ORIGINAL} if job.settings.method.tuning is not None else set()):
            del job.chains.learning[name]  # nothing reads it any more

    def _start_chains(self, job: Job) -> None:
        windows, bits, method = job.prepared.windows, job.settings.bits, job.settings.method
        if windows is None:
            return
        names, embedding = [ORIGINAL, *map(str, bits)], job.embedding()
        if "inputs" in method.needs:
            job.chains.learning = job.chains.start(names, windows.calibration, embedding)
        if method != BASELINE or len(bits) > 1:
            names += map(baseline, bits)
        job.chains.checking = job.chains.start(names, windows.heldout, embedding)

    def _run_block(self, job: Job, index: int) -> None:
        chains = job.chains
        with job.runner.block(index) as block:
            task = job.task(index, block)
            with counting(block) as calls:
                chains.advance(ORIGINAL, index, block)
            self._note_routing(job, f"{job.discovery.blocks[index]}.", calls)
            if job.state.has(index):
                planes = job.planes(index)
            else:
                task.targets = chains.learning.get(ORIGINAL)
                planes = self._solved(job, task)
                job.state.save(index, planes)
            for bits in job.settings.bits:
                job.quantize(task, planes, bits)
                chains.advance(str(bits), index, block)
                if baseline(bits) in chains.checking:
                    for name, weight in task.weights.items():
                        plain = BASELINE.solve_layer(weight, (bits,), job.settings.group_size)
                        task.put({name: decode(plain, bits)})
                    chains.advance(baseline(bits), index, block)
                return_free_memory()

    def _note_routing(self, job: Job, prefix: str, calls: dict[str, list[tuple[int, Tensor]]]) -> None:
        """Note how many tokens of the learning windows each expert got in the original."""
        learning, checking = (chains.get(ORIGINAL) for chains in (job.chains.learning, job.chains.checking))
        if learning is None:
            return
        later = 0 if checking is None else checking.shape[:2].numel()
        for name, found in calls.items():
            if found:
                tokens = tokens_of_experts(found, learning.shape[:2].numel(), later)
                job.routing[prefix + name] = tokens
                unseen = [str(expert) for expert, count in enumerate(tokens) if not count]
                if unseen:
                    note(f"{prefix}{name}: no token of the calibration text reached expert {', '.join(unseen)}")

    def _solved(self, job: Job, task: BlockTask) -> dict[str, PlaneWeight]:
        if "gradients" in job.settings.method.needs:
            task.sensitivity = job.state.load_tensors(SENSITIVITY, list(task.weights))
        return job.settings.method.solve_block(task)


class Measure(Stage):
    """Fill `Job.measured`, with nothing if there is no text. Raises CheckError if a loss is not finite."""

    def memory(self, prepared: Prepared) -> int:
        """What lies outside the blocks in fp32, and a quantized head in fp32 and its planes."""
        # decoding needs the planes at 1 byte a weight or less
        decoded = max((5 * layer.in_features * layer.out_features for layer in prepared.head), default=0)
        return prepared.parameter_bytes[0] + decoded

    def run(self, job: Job) -> None:
        checking = job.chains.checking
        if not checking:
            return
        if job.state.refined:
            self._run_again(job)
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

    def _run_again(self, job: Job) -> None:
        """Run the held-out windows through the blocks with their tuned scales."""
        names = [str(bits) for bits in job.settings.bits]
        job.chains.checking.update(job.chains.start(names, job.windows.heldout, job.embedding()))
        for index in range(len(job.discovery.blocks)):
            with job.runner.block(index) as block:
                task, planes = job.task(index, block), job.planes(index)
                for bits in job.settings.bits:
                    job.quantize(task, planes, bits)
                    job.chains.advance(str(bits), index, block)
