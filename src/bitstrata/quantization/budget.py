"""`--time-budget`: how much text is read, so that the job takes about so long.

What was chosen is in the fingerprint of the job, so a job that is resumed, or a result that is there, says it: only a
job that begins measures anything.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint import CheckpointReader, is_checkpoint
from ..errors import BitstrataError, PreflightError, UsageError
from ..progress import note
from .duration import fitting
from .preflight import prepare
from .settings import Settings
from .stages import stages_of
from .state import JOB_FOLDER


def within_budget(settings: Settings, problems: Sequence[BitstrataError]) -> Settings:
    """`settings` with no more text than fits the time budget, if there is one.

    Raises PreflightError, `problems` first, if anything is wrong or even the least text takes too long.
    """
    if settings.time_budget is None:
        return settings
    chosen = _chosen_before(settings.output)
    if chosen is None:
        prepared = prepare(settings, stages_of(settings), problems, weights=False)
        try:
            chosen = fitting(prepared, settings.time_budget)
        except UsageError as error:
            raise PreflightError([error]) from error
    note(f"time budget: calibrated on {chosen[0]} windows of {chosen[1]} tokens")
    return replace(settings, num_samples=chosen[0], seq_len=chosen[1])


def _chosen_before(output: Path) -> tuple[int, int] | None:
    """What the unfinished job or the result in `output` was made with, if there is one."""
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):  # what is wrong there is said later, in full
        found = json.loads((output / JOB_FOLDER / "job.json").read_text())
    if not found and is_checkpoint(output):
        found = dict(CheckpointReader(output).spec.provenance or {})
    numbers = found.get("num_samples"), found.get("seq_len")
    return numbers if all(isinstance(number, int) for number in numbers) else None  # type: ignore[return-value]
