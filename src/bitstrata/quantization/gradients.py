"""The stage that finds how much the loss minds a change of each weight, for methods that weigh errors by it."""

from __future__ import annotations

import torch

from ..calibration import fisher_bytes, fisher_diagonal
from ..progress import Steps
from .context import Job, Prepared, Stage
from .work import of_blocks, of_head, of_numbers


def sensitivity(index: int) -> str:
    """The part of the job's state that holds those of a block; it is dropped once the block is solved."""
    return f"fisher-{index:04d}"


class Gradients(Stage):
    """Compute the sensitivities (calibration/fisher.py), unless those of all blocks that are not solved are there."""

    def memory(self, prepared: Prepared) -> int:
        return fisher_bytes(prepared.model, prepared.discovery, prepared.settings.seq_len)

    def disk(self, prepared: Prepared) -> int:
        return 4 * prepared.discovery.weight_count

    def passing_disk(self, prepared: Prepared) -> int:
        """Hidden states before each block and behind the last one, and derivatives by what one reads and returns."""
        if prepared.windows is None:
            return 0
        return 4 * prepared.windows.calibration.numel() * prepared.hidden_size * (len(prepared.discovery.blocks) + 3)

    def operations(self, prepared: Prepared) -> dict[torch.dtype, float]:
        """A window runs forward, and once more with the way back, which is two; the head runs once less."""
        tokens = prepared.settings.num_samples * prepared.settings.seq_len
        blocks = 4 * (of_blocks(prepared) + of_numbers(prepared))
        return {torch.float32: tokens * (blocks + 2 * of_head(prepared))}

    def run(self, job: Job) -> None:
        blocks = [index for index in range(len(job.discovery.blocks)) if job.discovery.of_block(index)]
        if all(job.state.has(index) or job.state.has(sensitivity(index)) for index in blocks):
            return
        with Steps("gradients", 2 * len(job.discovery.blocks) + 1, "pass") as steps:
            fisher_diagonal(
                job.runner,
                job.windows.calibration,
                lambda index, found: job.state.save_tensors(sensitivity(index), dict(found)),
                job.state.folder,
                steps.step,
            )
