"""Growing and shrinking a running model: pages of its checkpoint read and dropped.

A page is one plane of one layer, or its scales for some bits. A model that was loaded with a plan or a budget holds,
of each planned layer, planes 0..b-1 and the scales for b bits: what the plan says, and nothing that another plan
would need. To resize,

    read       of every layer that changes, the planes above those it has, and the new scales, into the kernel's
               layout; requests run on meanwhile, at the old plan
    exchange   every changed layer's weight, and the plan, between two steps (nn/uses.py)
    drop       what the new plan does not need, when the last user of the old weight has ended

The planes that stay are shared, not copied. If reading fails, nothing has happened. Memory peaks at
the pages of both plans together.
"""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoint import CheckpointReader, Fingerprint
from ..errors import CheckpointError, PlanError, UsageError
from ..nn import PlaneLinear, bits_state
from ..planes import whole_number
from ..torch_state import ordinary_torch
from ..verbs import named
from .budget import Budget, ModelSizes, parse_budget
from .order import PAGES_FILE, PageOrder
from .page_reader import PageReader
from .plan import Plan

Size = int | str | Path | Budget | Mapping[str, int]  # uniform bits, a budget, a plan or a plan's file


@dataclass(frozen=True)
class Resized:
    """What a resize did.

    before, after: bytes that the whole model holds, as `bitstrata plan` counts them.
    added, dropped: bytes of pages; read: bytes read from files. layers: how many changed.
    seconds: until the new plan ran.
    """

    before: int
    after: int
    added: int
    dropped: int
    read: int
    layers: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Pages:
    """Where the pages of a model come from, and how many bytes they are.

    Args:
        verify: see PageReader.
        dtype: that the model's other tensors are loaded as; counts for budgets.
    """

    def __init__(self, folder: Path, *, verify: bool = False, dtype: torch.dtype | None = None) -> None:
        self.folder, self._verify = folder, verify
        self._reader: PageReader | None = PageReader(CheckpointReader(folder, paged=True), verify=verify)
        self.fingerprint = Fingerprint.of(self._reader.checkpoint)
        self.sizes = ModelSizes.of(self._reader.checkpoint, dtype)
        self._order: tuple[tuple[int, int], PageOrder] | None = None  # and when the file was written, and its size
        self._resizing = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """A copy opens the files anew when it is resized; until then it needs none."""
        return self.__dict__ | {"_reader": None, "_resizing": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _resizing=threading.Lock())

    def _open(self) -> PageReader:
        if self._reader is None:
            checkpoint = CheckpointReader(self.folder, paged=True)
            if Fingerprint.of(checkpoint) != self.fingerprint:
                raise CheckpointError(f"{self.folder} is not the checkpoint that the model was loaded from")
            self._reader = PageReader(checkpoint, verify=self._verify)
        return self._reader

    def plan(self, size: Size) -> Plan:
        """The plan for `size`. A budget takes the longest prefix of the stored page order that fits.

        Raises:
            PlanError: a plan that is malformed or of another model; for a budget between the smallest and the largest
                plan no page order, or one that is not of this model.
            UsageError: a budget that cannot be read, or that is below the smallest plan.
        """
        checkpoint = self._open().checkpoint
        whole = whole_number(size)
        if whole is not None:
            plan = Plan.uniform(checkpoint.spec, whole)
        elif isinstance(size, Mapping):
            plan = size if isinstance(size, Plan) else Plan(size)
        elif isinstance(size, Path) or (isinstance(size, str) and size.endswith(".json")):
            plan = Plan.load(size)
        elif isinstance(size, (str, Budget)):
            return self._plan_of_budget(checkpoint, parse_budget(size))
        else:
            raise UsageError(f"{size!r} is not a size", hint="give a plan, its file, a budget such as 600MB, or bits")
        plan.check(checkpoint)
        return plan

    def _plan_of_budget(self, checkpoint: CheckpointReader, budget: Budget) -> Plan:
        sizes = self.sizes
        room = sizes.limit(budget)  # the cheapest complaint first
        sizes.note_excess(budget)
        for bits, is_it in (
            (sizes.largest, room >= sizes.of_plan(sizes.largest).weights),
            (sizes.smallest, room == sizes.of_plan(sizes.smallest).weights),
        ):
            if is_it:  # whatever the order says in between
                return Plan(bits, self.fingerprint, str(budget), {"budget": str(budget)})
        path = self.folder / PAGES_FILE
        if not path.is_file():
            made = f"bitstrata plan {shlex.quote(str(self.folder))} --budget {budget.exact} --text FILE --pages"
            raise PlanError(
                f"{self.folder} has no {PAGES_FILE}, which says what a budget buys",
                hint=f"make it once: `{made}`; or give a plan",
            )
        status = path.stat()
        stamp = status.st_mtime_ns, status.st_size
        if self._order is None or self._order[0] != stamp:
            order = PageOrder.load(path)
            order.check(checkpoint, self.sizes)
            self._order = stamp, order
        return self._order[1].plan_for(sizes, budget)

    @ordinary_torch()
    def resize(self, model: PreTrainedModel, size: Size) -> Resized:
        """`bitstrata.resize`."""
        return self.exchange(model, self.plan(size))

    def exchange(self, model: PreTrainedModel, plan: Plan) -> Resized:
        """Let `model` hold and run `plan`. Raises CheckpointError, and leaves it as it is, if a page cannot be read."""
        state = bits_state(model)
        assert state.plan is not None
        state.check_outside()  # before the lock: its holder may be waiting for the caller's step
        with self._resizing:
            started = time.perf_counter()
            reader = self._open()
            held, start = dict(state.plan), reader.bytes_read
            changed = [name for name, bits in plan.items() if bits != held.get(name)]
            weights = {}
            for name in changed:
                layer = model.get_submodule(name)
                layer = getattr(layer, "base_layer", layer)  # with an adapter beside it
                assert isinstance(layer, PlaneLinear)
                pages = reader.pages(name, held.get(name, 0), plan[name])
                weights[layer] = layer.with_pages(plan[name], *pages)
            with state.changing(replace(plan, bits={name: plan[name] for name in self.sizes.layers})):
                if model.device.type == "cuda":
                    torch.cuda.synchronize(model.device)  # of steps that have returned, and of the copies above
                for layer, weight in weights.items():
                    layer.packed = weight
            seconds = time.perf_counter() - started
            added = sum(reader.page_bytes(name, held.get(name, 0), plan[name]) for name in changed)
            dropped = sum(reader.page_bytes(name, plan[name], held[name]) for name in changed if name in held)
            before = self.sizes.of_plan(held).total if held else self.sizes.fixed
            after, read = self.sizes.of_plan(plan).total, reader.bytes_read - start
            return Resized(before, after, added, dropped, read, len(changed), seconds)


@named
def resize(model: PreTrainedModel, size: Size) -> Resized:
    """Let a model that was loaded with a plan or a budget hold another: pages are read and dropped while it runs.

    Steps that are under way end at the old plan, later ones run at the new one; calls wait for at most a step.
    After it the model computes what a fresh load at this plan would, bit for bit.

    Args:
        size: a plan or its file, a budget such as "600MB" or "3.2bpw", or uniform bits.

    Raises:
        UsageError: the model was loaded whole; a budget below the smallest plan; called from inside a step.
        PlanError: a plan or page order that is malformed or of another model.
        CheckpointError: a page that is missing, damaged or changed; the model stays as it was.
    """
    bits_state(model)  # says so where nothing is quantized
    resized: Resized = model.resize(size)  # type: ignore[operator]
    return resized
