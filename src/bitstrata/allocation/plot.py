"""A picture of loss against bytes: the uniform staircase, the plans between, this one (extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ..checkpoint import CheckpointReader
from ..errors import UsageError, disk_errors
from ..plans import ModelSizes, PageOrder, Plan
from .objective import Objective
from .report import PlanRow
from .sensitivity import Sensitivity

BUDGETS = 24  # plans on the line


def check_picture(path: Path) -> None:
    """Raise UsageError if there is nothing to draw with, or it cannot draw to such a file."""
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib, which is not installed", hint="pip install 'bitstrata[plots]'")
    from matplotlib.backend_bases import FigureCanvasBase

    if path.suffix.removeprefix(".") not in FigureCanvasBase.filetypes:
        raise UsageError(f"cannot draw {path}: unknown kind of picture", hint="use a name that ends in .svg or .png")


def draw(
    path: Path,
    order: PageOrder,
    found: Sensitivity,
    reader: CheckpointReader,
    sizes: ModelSizes,
    rows: Sequence[PlanRow],
    heldout: Objective | None,
) -> None:
    """Draw the picture to `path`; losses are measured on held-out text if there is an objective, else predicted."""
    from matplotlib.figure import Figure

    def loss(plan: Plan | dict[str, int]) -> float:
        return found.predict(plan) if heldout is None else heldout.loss(dict(plan))

    staircase = [Plan.uniform(reader.spec, bits) for bits in reader.spec.bits]
    x = [sizes.of_plan(plan).total / 1e6 for plan in staircase]
    y = [loss(plan) for plan in staircase]
    low, high = (sizes.of_plan(staircase[end]).total for end in (0, -1))
    plans = [order.plan_for(sizes, f"{int(budget)}B") for budget in np.linspace(low, high, BUDGETS)]
    line = [(sizes.of_plan(plan).total / 1e6, loss(plan)) for plan in plans]

    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    axes.step(x, y, where="post", color="0.6", linewidth=1)
    axes.plot(x, y, "s", color="0.4", label="uniform")
    for bits, at, value in zip(reader.spec.bits, x, y, strict=True):
        axes.annotate(str(bits), (at, value), textcoords="offset points", xytext=(5, 5), color="0.4")
    axes.plot(*zip(*line, strict=True), color="tab:blue", linewidth=1.2, label="prefixes of the order of pages")
    shown = {"this plan": "o", "random": "x"}
    for row in rows:
        marked = row.predicted if heldout is None else row.measured
        if row.name in shown and marked is not None:
            color = "tab:blue" if row.name == "this plan" else "tab:red"
            axes.plot(row.total_bytes / 1e6, marked, shown[row.name], color=color, label=row.name)
    axes.set_yscale("log")
    axes.set_xlabel("MB, all weights")
    axes.set_ylabel(f"divergence, nats a token ({'predicted' if heldout is None else 'held-out text'})")
    axes.legend()
    axes.grid(True, which="major", alpha=0.3)
    with disk_errors(path):
        figure.savefig(path, bbox_inches="tight")
