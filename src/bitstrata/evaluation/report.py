"""The result of an evaluation: prints as a table, converts to the JSON of the contract."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..tables import optional, percent, render


@dataclass(frozen=True)
class BitsResult:
    """One row: a model at `bits` (an int, or the name of a plan).

    bpw_read and bytes: what one pass over the quantized layers reads, scales included.
    nll in nats a token; kld and top1_agreement against the reference, None without one.
    """

    bits: int | str
    perplexity: float
    nll: float
    kld: float | None
    top1_agreement: float | None
    bpw_read: float
    bytes: int


@dataclass(frozen=True)
class Evaluation:
    """What `bitstrata.evaluate` returns.

    arithmetic, kernel: what the quantized layers were computed in and by: exact, int8, or both where short windows ran
        in another than long ones.
    """

    model: str
    text: str
    tokens: int
    seq_len: int
    reference: dict[str, float] | None
    results: tuple[BitsResult, ...]
    arithmetic: str
    kernel: str
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rows = (
            []
            if self.reference is None
            else [["reference", "", f"{self.reference['perplexity']:.4f}", f"{self.reference['nll']:.4f}", "", ""]]
        )
        rows += [
            [
                str(r.bits),
                f"{r.bpw_read:.3f}",
                f"{r.perplexity:.4f}",
                f"{r.nll:.4f}",
                optional(r.kld),
                percent(r.top1_agreement),
            ]
            for r in self.results
        ]
        title = (
            f"{self.model} on {self.text}: {self.tokens} tokens, in {self.arithmetic} arithmetic (kernel {self.kernel})"
        )
        return render(title, ["bits", "bpw read", "perplexity", "nll", "kld", "top-1"], rows)
