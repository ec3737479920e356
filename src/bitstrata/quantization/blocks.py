"""The blocks: every one is read, solved, made durable, and passed by every chain of hidden states.

An interrupted job recomputes the chains from its finished blocks, so a resumed job sees exactly the numbers the first
run saw.
"""

from __future__ import annotations

from ..memory import return_free_memory
from ..planes import PlaneWeight, decode
from ..progress import Steps, log
from ..solvers import RTN
from .block_task import BlockTask
from .chains import ORIGINAL, baseline
from .context import Job, Prepared, Stage
from .state import SENSITIVITY

BASELINE = RTN()  # what the final check compares with, at each bits alone


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
        job.chains.learning.clear()  # nothing reads it any more

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
            chains.advance(ORIGINAL, index, block)
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

    def _solved(self, job: Job, task: BlockTask) -> dict[str, PlaneWeight]:
        if "gradients" in job.settings.method.needs:
            task.sensitivity = job.state.load_tensors(SENSITIVITY, list(task.weights))
        return job.settings.method.solve_block(task)
