"""What a quantization job found out: prints as a table, saved as `bitstrata_report.json`.

The saved part holds only what the inputs determine, so that equal inputs give equal bytes; time and
memory are in the returned object alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..evaluate import Measured
from ..evaluate.report import optional, percent, render

# A precision whose top token differs from the original's this often is called not worth using.
USELESS_TOP1 = 0.5


@dataclass(frozen=True)
class Report:
    """The result of `bitstrata.quantize`.

    results: one entry a bits value: bpw_read, bytes, and on held-out windows nll, kld, top1_agreement,
        the same for dedicated round-to-nearest under `rtn`, and a `verdict` in words. The measured
        values are None when no text was given.
    layer_error: layer -> bits -> ||W - W_bits||^2 / ||W||^2.
    """

    output: str
    method: str
    group_size: int
    results: tuple[dict[str, Any], ...]
    reference: dict[str, float] | None
    heldout_tokens: int
    layer_error: Mapping[str, Mapping[str, float]]
    left_out: tuple[dict[str, Any], ...]
    tied: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    total_bytes: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    def saved(self) -> dict[str, Any]:
        """What goes into `bitstrata_report.json`."""
        volatile = {"output", "seconds", "peak_memory_bytes", "total_bytes"}
        return {key: value for key, value in self.to_json().items() if key not in volatile}

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __str__(self) -> str:
        rows = []
        if self.reference is not None:
            rows.append(["original", "", "", f"{self.reference['nll']:.4f}", "", "", "", ""])
        for row in self.results:
            rtn = row["rtn"] or {}
            rows.append(
                [
                    str(row["bits"]),
                    f"{row['bpw_read']:.3f}",
                    f"{row['bytes'] / 1e6:.2f}",
                    optional(row["nll"]),
                    optional(row["kld"]),
                    percent(row["top1_agreement"]),
                    optional(rtn.get("nll")),
                    optional(rtn.get("kld")),
                ]
            )
        columns = ["bits", "bpw read", "MB read", "nll", "kld", "top-1", "rtn nll", "rtn kld"]
        where = f", measured on {self.heldout_tokens} held-out tokens" if self.heldout_tokens else ""
        lines = [render(f"{self.output}: {self.method}, group size {self.group_size}{where}", columns, rows)]
        lines += [f"bits {row['bits']}: {row['verdict']}" for row in self.results if row["verdict"] != "ok"]
        reasons: dict[str, int] = {}
        for entry in self.left_out:
            reasons[entry["reason"]] = reasons.get(entry["reason"], 0) + 1
        if reasons:
            lines.append("not quantized: " + ", ".join(f"{count} x {reason}" for reason, count in reasons.items()))
        return "\n".join(lines)


def verdict(bits: int, measured: Measured | None, rtn: Measured | None, lower: Measured | None) -> str:
    """One sentence on whether `bits` is worth using; "ok" if nothing is wrong with it."""
    if measured is None or measured.kld is None or measured.top1_agreement is None:
        return "not measured: no calibration text was given"
    if measured.top1_agreement < USELESS_TOP1:
        return (
            f"not worth using: the most likely token is the original's in only {percent(measured.top1_agreement)} "
            "of the positions"
        )
    if rtn is not None and rtn.kld is not None and measured.kld > rtn.kld:
        return f"no better than plain round-to-nearest at {bits} bits (kld {rtn.kld:.4f})"
    if lower is not None and lower.nll < measured.nll and lower.kld is not None and lower.kld < measured.kld:
        return "worse than the bits below it: use those"
    return "ok"
