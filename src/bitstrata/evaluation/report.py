"""The result of an evaluation: prints as tables, converts to the JSON of the contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..metrics import Spread
from ..tables import optional, percent, render
from .margins import Margins
from .tasks import Scores


@dataclass(frozen=True)
class BitsResult:
    """One row: a model at `bits` (an int, or the name of a plan).

    bpw_read and bytes: what one pass over the quantized layers reads, scales included.
    nll in nats a token; kld, top1_agreement and spread against the reference, None without one. All of them, and
    perplexity, are None where no text was given.
    perplexity_error and those in spread: standard errors, None of a single token.
    tasks: by task and metric, both as lm-evaluation-harness names them; None where no tasks were given.
    margins: by kind of decision (margins.py); None where no chats were given.
    """

    bits: int | str
    perplexity: float | None
    nll: float | None
    kld: float | None
    top1_agreement: float | None
    bpw_read: float
    bytes: int
    perplexity_error: float | None = None
    spread: Spread | None = None
    tasks: Scores | None = None
    margins: dict[str, Margins] | None = None


@dataclass(frozen=True)
class Evaluation:
    """What `bitstrata.evaluate` returns.

    text, seq_len, reference: None where they were not asked for; tokens is 0 without a text.
    scored: which tokens of a window were predicted: all, or second-half.
    reference: perplexity, nll and perplexity_error of the original, its `tasks` and `margins`.
    arithmetic, kernel: what the quantized layers were computed in and by: exact, int8, or both where short windows ran
        in another than long ones.
    tasks: how each task was asked: samples, num_fewshot, version.
    chats: what margins were measured on.
    """

    model: str
    text: str | None
    tokens: int
    seq_len: int | None
    reference: dict[str, Any] | None
    results: tuple[BitsResult, ...]
    arithmetic: str
    kernel: str
    notes: tuple[str, ...] = field(default=())
    scored: str = "all"
    tasks: dict[str, dict[str, Any]] | None = None
    chats: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        ran = f"in {self.arithmetic} arithmetic (kernel {self.kernel})"
        parts = []
        if self.text is not None:
            windows = f"{'windows' if self.scored == 'all' else 'second halves of windows'} of {self.seq_len}"
            parts.append(_losses(f"{self.model} on {self.text}: {self.tokens} tokens, {windows}, {ran}", self))
            parts += _divergences(self.results)
        if self.tasks is not None:
            parts.append(_task_scores(f"{self.model} on tasks of lm-evaluation-harness, {ran}", self))
        if self.chats is not None:
            parts.append(_decision_margins(f"{self.model}: decision margins on {self.chats}, {ran}", self))
        return "\n\n".join(parts)


def _losses(title: str, found: Evaluation) -> str:
    columns = ["bits", "bpw read", "perplexity", "±", "nll", "kld", "top-1"]
    rows: list[list[str]] = []
    if found.reference is not None:
        loss = [optional(found.reference[name]) for name in ("perplexity", "perplexity_error", "nll")]
        rows.append(["reference", "", *loss, "", ""])
    for row in found.results:
        loss = [optional(value) for value in (row.perplexity, row.perplexity_error, row.nll, row.kld)]
        rows.append([str(row.bits), f"{row.bpw_read:.3f}", *loss, percent(row.top1_agreement)])
    return render(title, columns, rows)


def _divergences(results: Sequence[BitsResult]) -> list[str]:
    """A table of how divergence is spread over tokens; none without a reference."""
    columns: Sequence[tuple[str, Callable[[BitsResult, Spread], str]]] = (
        ("kld", lambda row, _: optional(row.kld, 5)),
        ("±", lambda _, it: optional(it.kld_error, 5)),
        ("median", lambda _, it: optional(it.kld_median, 5)),
        ("99%", lambda _, it: optional(it.kld_p99)),
        ("99.9%", lambda _, it: optional(it.kld_p999)),
        ("max", lambda _, it: optional(it.kld_max)),
        ("ln ratio", lambda _, it: optional(it.ln_ratio)),
        ("±", lambda _, it: optional(it.ln_ratio_error)),
        ("rms dp", lambda _, it: percent(it.rms_dp, 2)),
        ("±", lambda _, it: percent(it.rms_dp_error, 2)),
        ("top-1", lambda row, _: percent(row.top1_agreement, 2)),
        ("±", lambda _, it: percent(it.top1_error, 2)),
    )
    rows = [
        [str(row.bits), *(show(row, row.spread) for _, show in columns)] for row in results if row.spread is not None
    ]
    what = "divergence from the reference, token by token (ln ratio of perplexities, dp of the right token)"
    return [render(what, ["bits", *(name for name, _ in columns)], rows)] if rows else []


def _task_scores(title: str, found: Evaluation) -> str:
    """A row for every metric of every task, a column for each bits."""
    columns = [("reference", found.reference["tasks"])] if found.reference is not None else []
    columns += [(str(row.bits), row.tasks) for row in found.results]
    rows = []
    for task, metrics in (found.results[0].tasks or {}).items():
        for name in metrics:
            metric, _, filtered = name.partition(",")
            if metric.endswith("_stderr"):
                continue
            label = f"{task} {metric}" if filtered == "none" else f"{task} {metric} ({filtered})"
            rows.append([label, *(_score(scores[task], metric, filtered) for _, scores in columns)])
    return render(title, ["task", *(name for name, _ in columns)], rows)


def _score(metrics: dict[str, float | None], metric: str, filtered: str) -> str:
    value, error = metrics.get(f"{metric},{filtered}"), metrics.get(f"{metric}_stderr,{filtered}")
    return optional(value) if error is None else f"{optional(value)} ±{error:.4f}"


def _decision_margins(title: str, found: Evaluation) -> str:
    columns = ["bits", "decision", "tokens", "right", "median", "10%", "90%", "of reference", "flipped"]
    measured = [("reference", found.reference["margins"])] if found.reference is not None else []
    measured += [(str(row.bits), row.margins) for row in found.results]
    rows = [
        [
            name,
            kind,
            str(it.decisions),
            percent(it.right),
            *(optional(value, 3) for value in (it.median, it.p10, it.p90)),
            optional(it.of_reference, 2),
            percent(it.flipped),
        ]
        for name, margins in measured
        for kind, it in margins.items()
    ]
    return render(title, columns, rows)
