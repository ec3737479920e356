"""How sensitive the loss is to each weight, for methods that weigh errors by it: once, before the blocks."""

from __future__ import annotations

from ..calibration import fisher_bytes, fisher_diagonal
from ..progress import Steps
from .context import Job, Prepared, Stage
from .state import SENSITIVITY


class Gradients(Stage):
    """Compute the sensitivities (calibration/fisher.py), unless all that reads them is done."""

    needs = frozenset({"windows", "whole model"})

    def memory(self, prepared: Prepared) -> int:
        return fisher_bytes(prepared.model, prepared.discovery, prepared.settings.seq_len)

    def disk(self, prepared: Prepared) -> int:
        return 4 * prepared.discovery.weight_count

    def run(self, job: Job) -> None:
        if job.state.has(SENSITIVITY) or all(map(job.state.has, range(len(job.discovery.blocks)))):
            return
        windows = job.windows.calibration
        with Steps("gradients", len(windows), "window") as steps:
            job.state.save_tensors(SENSITIVITY, fisher_diagonal(job.runner, windows, steps.step))
