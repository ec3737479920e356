"""A universal order of pages: every budget is a prefix of it.

A page raises some layers (usually one) from some bits to higher ones: it adds planes and exchanges the
scales, so its bytes are a difference. The order starts at the smallest plan, every layer at its lowest
bits, and ends at the largest. What is resident for a budget is the longest prefix that fits; a smaller
budget's plan is never above a larger one's in any layer, so shrinking and growing only ever drop and
read pages.

Stored beside the checkpoint as `bitstrata_pages.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..checkpoint import CheckpointReader, Fingerprint, write_json
from ..checkpoint.schema import Strict
from ..errors import PlanError
from .budget import Budget, ModelSizes
from .plan import Plan, read_file

PAGES_FILE = "bitstrata_pages.json"
PAGES_VERSION = 1


class Page(Strict):
    """Raises `layers`, all at `from_bits`, to `to_bits`.

    bytes: how many more the layers then hold; saving: by how much the loss is expected to fall, nats a token.
    """

    layers: list[str]
    from_bits: int
    to_bits: int
    bytes: int
    saving: float


class _PagesFile(Strict):
    kind: Literal["bitstrata pages"] = "bitstrata pages"
    version: int
    model: Fingerprint
    provenance: dict[str, Any] = Field(default_factory=dict)
    pages: list[Page]


@dataclass(frozen=True)
class PageOrder:
    """Pages from the smallest plan to the largest, for one checkpoint."""

    pages: Sequence[Page]
    model: Fingerprint
    provenance: dict[str, Any] = field(default_factory=dict)

    def check(self, reader: CheckpointReader, sizes: ModelSizes) -> None:
        """Raise PlanError unless the order is of this checkpoint and leads from its smallest plan to its largest."""
        self.model.check(reader, PAGES_FILE)
        current = dict(sizes.smallest)
        for number, page in enumerate(self.pages):
            where = f"{PAGES_FILE}: page {number}"
            grown = 0
            for layer in page.layers:
                if layer not in current:
                    raise PlanError(f"{where} names layer {layer}, which is not planned")
                held = sizes.layers[layer]
                if current[layer] != page.from_bits or page.to_bits not in held or page.to_bits <= page.from_bits:
                    raise PlanError(
                        f"{where} raises {layer} from {page.from_bits} to {page.to_bits} bits, "
                        f"but it is at {current[layer]} and has {', '.join(map(str, held))}"
                    )
                grown += held[page.to_bits] - held[page.from_bits]
                current[layer] = page.to_bits
            if grown != page.bytes:
                raise PlanError(f"{where} says {page.bytes} bytes, but its layers grow by {grown}")
        if current != sizes.largest:
            raise PlanError(f"{PAGES_FILE} does not end at the largest plan", hint="make it again")

    def plan_for(self, sizes: ModelSizes, budget: str | Budget) -> Plan:
        """The plan of the longest prefix within `budget`. Raises UsageError if the smallest plan does not fit."""
        left = sizes.limit(budget) - sizes.of_plan(sizes.smallest).weights
        plan, count = dict(sizes.smallest), 0
        for page in self.pages:
            if page.bytes > left:
                break
            left -= page.bytes
            count += 1
            plan.update(dict.fromkeys(page.layers, page.to_bits))
        provenance = {"budget": str(budget), "pages": count}
        return Plan(plan, self.model, name=str(budget), provenance=provenance)

    def save(self, path: Path) -> None:
        """Write the order as JSON; the file appears whole or not at all."""
        file = _PagesFile(version=PAGES_VERSION, model=self.model, provenance=self.provenance, pages=list(self.pages))
        write_json(path, file.model_dump(exclude_none=True))

    @classmethod
    def load(cls, path: Path) -> PageOrder:
        """An order from a file. Raises PlanError naming what is malformed."""
        file = read_file(path, _PagesFile, PAGES_VERSION, "page order")
        return cls(file.pages, file.model, file.provenance)
