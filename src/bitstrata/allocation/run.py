"""`bitstrata.plan`: the best bits for every layer within a budget, predicted, measured and compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration import calibration_windows, read_mix, text_digest, text_name
from ..checkpoint import CheckpointReader, Fingerprint
from ..errors import UsageError
from ..models import check_vocabulary, context_limit, load_reference, load_tokenizer, resolve
from ..models.load import pick_device
from ..models.source import SourceModel
from ..options import PlanOptions
from ..plans import PAGES_FILE, ModelSizes, Plan, load, parse_budget
from ..progress import log, note, notes, own_notes
from ..torch_state import ordinary_torch
from ..verbs import verb
from . import greedy, milp, paired, waterfill
from .objective import Objective
from .order import page_order
from .plot import check_picture, draw
from .problem import Array, Bounds, Problem, find_choices, random_allocation
from .report import PlanReport, PlanRow
from .sensitivity import SENSITIVITY_FILE, Measure, MeasurementSettings, Sensitivity, measure_sensitivity

SOLVERS: dict[str, Callable[[Problem], Array]] = {
    "paired": paired.solve,
    "milp": milp.solve,
    "greedy": greedy.solve,
    "waterfill": waterfill.solve,
}
DEFAULT_WINDOWS = 16
DEFAULT_SEQ_LEN = 512


@verb(PlanOptions)
@ordinary_torch()
@own_notes()
def plan(options: PlanOptions) -> PlanReport:
    """Find the bits of every layer that lose least within `budget`.

    With a text, some of its windows measure layers, others compare the plan; without one, what was measured before is
    used, and the plan is neither refined nor compared by its true loss. `pages` leads from the smallest plan to the
    largest whatever the bounds, so that every budget is a prefix of it; with `together` its pages raise such layers at
    once. `measure` kld takes one pass for each layer and bits, hessian one pass in all, and is a worse guide.

    Raises:
        UsageError: a budget below the smallest plan (the message says the least), an unknown solver, bounds that
            leave no plan, a file that cannot be written, ways of measuring without a text to measure on.
        PlanError: a sensitivity file of another model, text or settings.
    """
    budget = parse_budget(options.budget)
    folder = _checked_folder(options)
    reader = CheckpointReader(folder)
    sizes = ModelSizes.of(reader)
    limit = sizes.limit(budget)
    together, bounds = options.together, Bounds(options.min_bits or {}, options.max_bits or {})
    find_choices(sizes, limit, together=together, bounds=bounds)  # raises if they leave no plan
    sizes.note_excess(budget)

    path = Path(options.sensitivity) if options.sensitivity is not None else folder / SENSITIVITY_FILE
    measured = None if options.text is None else _MeasuredOn.of(reader, options.text, options)
    found = _sensitivity(path, reader, measured)
    true_loss = None if measured is None else measured.calibration.loss
    problem = Problem.build(found, sizes, limit, together=together, bounds=bounds, true_loss=true_loss)
    x = SOLVERS[options.solver](problem)
    size = sizes.of_plan(problem.plan(x))
    rows = _rows(problem, x, found, reader, sizes, measured, options.seed)
    provenance = {
        "budget": str(budget),
        "solver": options.solver,
        "bytes": size.total,
        "bpw": size.bpw,
        "divergence_from": found.target,
        "predicted": rows[0].predicted,
        "measured": rows[0].measured,
    }
    made = Plan(problem.plan(x), Fingerprint.of(reader), str(budget), provenance)
    if options.output is not None:
        made.save(options.output)
        log.info(f"wrote {options.output}")
    if options.pages or options.plot is not None:
        order = page_order(found, reader, sizes, together=together)
        if options.pages:
            order.save(folder / PAGES_FILE)
            log.info(f"wrote {folder / PAGES_FILE}")
        if options.plot is not None:
            draw(Path(options.plot), order, found, reader, sizes, rows, measured.heldout if measured else None)
            log.info(f"wrote {options.plot}")
    return PlanReport(
        model=str(options.model),
        budget=str(budget),
        solver=options.solver,
        plan=made,
        size=size,
        rows=tuple(rows),
        target=found.target,
        heldout_tokens=measured.heldout.positions if measured else 0,
        notes=notes(),
    )


def _checked_folder(options: PlanOptions) -> Path:
    """The checkpoint's folder. Raises UsageError for what cannot be asked for, before anything is read."""
    if options.solver not in SOLVERS:
        raise UsageError(f"there is no solver {options.solver!r}", hint=f"solvers: {', '.join(SOLVERS)}")
    if options.measure not in (None, *get_args(Measure)):
        raise UsageError(f"--measure {options.measure!r} is not known", hint="use kld or hessian")
    windows, seq_len = options.windows, options.seq_len
    if (windows is not None and windows < 1) or (seq_len is not None and seq_len < 2):
        raise UsageError(f"windows must be at least 1 and seq_len at least 2, got {windows} and {seq_len}")
    idle = [name for name in ("reference", "measure", "windows", "seq_len") if getattr(options, name) is not None]
    if options.text is None and idle:
        raise UsageError(
            f"without a text nothing is measured, so {', '.join(idle)} would change nothing",
            hint="give the text as well (--text FILE), or leave them out to use what was measured before",
        )
    for path in (options.output, options.plot, options.sensitivity):
        if path is not None:
            _check_writable(Path(path))
    if options.plot is not None:
        check_picture(Path(options.plot))
    return resolve(options.model, hub=options.hub, kind="bitstrata checkpoint")


def _check_writable(path: Path) -> None:
    """Raise UsageError if there is no folder for the file `path`, or it is a folder itself."""
    if not path.parent.is_dir():
        raise UsageError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.is_dir():
        raise UsageError(f"{path} cannot be written: it is a folder", hint="name a file in it")


@dataclass(frozen=True)
class _MeasuredOn:
    """What measures true losses: on the windows that layers are measured on, and on others."""

    settings: MeasurementSettings
    calibration: Objective
    heldout: Objective
    windows: Tensor

    @classmethod
    def of(cls, reader: CheckpointReader, text: str | Path, options: PlanOptions) -> _MeasuredOn:
        seq_len, reference, seed = options.seq_len, options.reference, options.seed
        documents = read_mix(text, part="calibration")
        where = pick_device(options.device)
        tokenizer = load_tokenizer(reader.folder)
        # float32 on a CPU, as in `evaluate`: exact there, and no slower
        model: PreTrainedModel = load(reader.folder, device=where, dtype=torch.float32 if where.type == "cpu" else None)
        count = options.windows or DEFAULT_WINDOWS
        length = min(seq_len or DEFAULT_SEQ_LEN, context_limit(model.config) or DEFAULT_SEQ_LEN)
        if seq_len is not None and length < seq_len:
            note(f"seq-len lowered from {seq_len} to {length}, the model's context")
        cut = calibration_windows(tokenizer, documents, num_samples=count, seq_len=length, num_heldout=count, seed=seed)
        check_vocabulary((int(cut.calibration.max()), int(cut.heldout.max())), model.config, tokenizer)
        if len(cut.calibration) < count:
            note(f"the text has {len(cut.calibration)} windows to measure on, not {count}")
        original = load_reference(reference, model, where, options.other)
        digests = None
        if reference is not None:
            digests = SourceModel(resolve(reference, hub=options.other, kind="reference model")).digests()
        settings = MeasurementSettings(
            measure=cast("Measure", options.measure or "kld"),
            text=text_name(text),
            text_sha256=text_digest(documents),
            reference=None if reference is None else Path(reference).name,
            reference_sha256=None if digests is None else text_digest([f"{k} {v}" for k, v in sorted(digests.items())]),
            windows=len(cut.calibration),
            seq_len=length,
            seed=seed,
            windows_sha256=cut.digest(),
        )
        calibration, heldout = (Objective(model, ids, original) for ids in (cut.calibration, cut.heldout))
        return cls(settings, calibration, heldout, cut.calibration)


def _sensitivity(path: Path, reader: CheckpointReader, measured: _MeasuredOn | None) -> Sensitivity:
    if path.exists():
        return Sensitivity.load(path, reader, None if measured is None else measured.settings)
    if measured is None:
        raise UsageError(
            f"the layers of {reader.folder} have not been measured yet: there is no {path}",
            hint="give a text to measure them on: --text FILE",
        )
    log.info(f"measuring what each layer costs; {path} keeps it for other budgets")
    found = measure_sensitivity(measured.calibration, reader, measured.settings, path, measured.windows)
    log.info(f"wrote {path}")
    return found


def _rows(
    problem: Problem,
    x: Array,
    found: Sensitivity,
    reader: CheckpointReader,
    sizes: ModelSizes,
    measured: _MeasuredOn | None,
    seed: int,
) -> list[PlanRow]:
    """The plan, the uniform plans around it, and a random plan of the same size."""
    own = sizes.of_plan(problem.plan(x)).weights
    candidates = {"this plan": problem.plan(x)}
    uniform = {bits: Plan.uniform(reader.spec, bits) for bits in reader.spec.bits}
    weights = {bits: sizes.of_plan(plan).weights for bits, plan in uniform.items()}
    below = [bits for bits in uniform if weights[bits] <= own]
    above = [bits for bits in uniform if weights[bits] > own]
    candidates |= {f"uniform {bits}": dict(uniform[bits]) for bits in (*below[-1:], *above[:1])}
    candidates["random"] = problem.plan(random_allocation(problem, seed))
    rows = []
    for name, bits in candidates.items():
        loss = measured.heldout.loss(bits) if measured else None
        rows.append(PlanRow.of(name, sizes.of_plan(bits), found.predict(bits), loss))
    return rows
