"""The result of an evaluation: prints as tables, converts to the JSON of the contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..metrics import Spread
from ..tables import optional, percent, render


@dataclass(frozen=True)
class BitsResult:
    """One row: a model at `bits` (an int, or the name of a plan).

    bpw_read and bytes: what one pass over the quantized layers reads, scales included.
    nll in nats a token; kld, top1_agreement and spread against the reference, None without one.
    perplexity_error and those in spread: standard errors, None of a single token.
    """

    bits: int | str
    perplexity: float
    nll: float
    kld: float | None
    top1_agreement: float | None
    bpw_read: float
    bytes: int
    perplexity_error: float | None = None
    spread: Spread | None = None


@dataclass(frozen=True)
class Evaluation:
    """What `bitstrata.evaluate` returns.

    scored: which tokens of a window were predicted: all, or second-half.
    arithmetic, kernel: what the quantized layers were computed in and by: exact, int8, or both where short windows ran
        in another than long ones.
    """

    model: str
    text: str
    tokens: int
    seq_len: int
    reference: dict[str, float | None] | None
    results: tuple[BitsResult, ...]
    arithmetic: str
    kernel: str
    notes: tuple[str, ...] = field(default=())
    scored: str = "all"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        windows = (
            f"windows of {self.seq_len}" if self.scored == "all" else f"second halves of windows of {self.seq_len}"
        )
        title = (
            f"{self.model} on {self.text}: {self.tokens} tokens, {windows}, "
            f"in {self.arithmetic} arithmetic (kernel {self.kernel})"
        )
        rows: list[list[str]] = []
        if self.reference is not None:
            base = self.reference
            loss = [optional(base[name]) for name in ("perplexity", "perplexity_error", "nll")]
            rows.append(["reference", "", *loss, "", ""])
        for row in self.results:
            rows.append(
                [
                    str(row.bits),
                    f"{row.bpw_read:.3f}",
                    f"{row.perplexity:.4f}",
                    optional(row.perplexity_error),
                    f"{row.nll:.4f}",
                    optional(row.kld),
                    percent(row.top1_agreement),
                ]
            )
        tables = [render(title, ["bits", "bpw read", "perplexity", "±", "nll", "kld", "top-1"], rows)]
        spread = [(str(row.bits), row) for row in self.results if row.spread is not None]
        if spread:
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
            cells = [[name, *(show(row, row.spread) for _, show in columns if row.spread)] for name, row in spread]
            what = "divergence from the reference, token by token (ln ratio of perplexities, dp of the right token)"
            tables.append(render(what, ["bits", *(name for name, _ in columns)], cells))
        return "\n\n".join(tables)
