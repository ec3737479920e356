"""What `bitstrata plan` found: prints as tables, converts to JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..plans import Plan, PlanBytes
from ..tables import optional, render

_BLOCK = re.compile(r"^(.*?)\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class PlanRow:
    """One plan in the comparison. Losses are KL divergences, nats a token; measured on held-out text."""

    name: str
    total_bytes: int
    weight_bytes: int
    bpw: float
    predicted: float | None
    measured: float | None

    @classmethod
    def of(cls, name: str, size: PlanBytes, predicted: float | None, measured: float | None) -> PlanRow:
        return cls(name, size.total, size.weights, size.bpw, predicted, measured)


@dataclass(frozen=True)
class PlanReport:
    """What `bitstrata.plan` returns.

    plan: layer -> bits, ready for `bits=`. size: its bytes. rows: the plan, its uniform neighbours, a random plan.
    target: what the loss is a divergence from. heldout_tokens: what `measured` is over; 0 if nothing was measured.
    """

    model: str
    budget: str
    solver: str
    plan: Plan
    size: PlanBytes
    rows: tuple[PlanRow, ...]
    target: str
    heldout_tokens: int
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "budget": self.budget,
            "solver": self.solver,
            "bits": dict(self.plan.bits),
            "weight_bytes": self.size.weights,
            "fixed_bytes": self.size.fixed,
            "total_bytes": self.size.total,
            "bpw": self.size.bpw,
            "target": self.target,
            "heldout_tokens": self.heldout_tokens,
            "rows": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        rows = [
            [row.name, f"{row.bpw:.3f}", str(row.total_bytes), optional(row.predicted, 5), optional(row.measured, 5)]
            for row in self.rows
        ]
        over = f" over {self.heldout_tokens} held-out tokens" if self.heldout_tokens else ""
        table = render(
            f"divergence from {self.target}{over}, nats a token",
            ["plan", "bpw read", "bytes in all", "predicted", "measured"],
            rows,
        )
        head = f"{self.model} within {self.budget} ({self.solver}): {self.size}"
        return "\n".join([head, "", pattern(self.plan), "", table])


def pattern(plan: Mapping[str, int]) -> str:
    """A line for each kind of layer, a digit for each block; a layer outside the blocks has a line of its own."""
    kinds: dict[str, dict[int, int]] = {}
    for name, bits in plan.items():
        found = _BLOCK.match(name)
        kinds.setdefault(found[3] if found else name, {})[int(found[2]) if found else 0] = bits
    width = max(map(len, kinds))
    blocks = max(max(of) for of in kinds.values()) + 1
    lines = [
        f"{kind:<{width}}  " + "".join(str(of.get(block, "-")) for block in range(blocks)).rstrip("-")
        for kind, of in kinds.items()
    ]
    return "\n".join([f"{'bits of each block:':<{width}}", *lines])
