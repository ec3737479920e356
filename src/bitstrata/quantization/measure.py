"""The final check: each precision on held-out windows, next to the original and to dedicated round-to-nearest.

The chains that passed the blocks give the logits, without ever holding the model.
"""

from __future__ import annotations

from ..errors import CheckError
from ..evaluation import Tally
from .chains import ORIGINAL
from .context import Job, Prepared, Stage


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
