"""Results of one shape and regime as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bitstrata.tables import optional, render

from .contender import Contender
from .measure import Timing

BASELINE = "torch bf16"
OURS = ("fp32", "bf16")  # activations
HEAD = (
    "x bf16: torch bf16's time over this one's. vs fp32, vs bf16: this one's time over ours at the same bits,\n"
    "with float32 and with bf16 activations (above 1: ours is faster). bpw: bits a weight read, scales included."
)
COLUMNS = ["product", "x", "bpw", "MB", "ms", "quartiles", "GB/s", "x bf16", "vs fp32", "vs bf16", "error"]


@dataclass(frozen=True)
class Result:
    """One contender at one shape and regime; see HEAD for the ratios, None where there is nothing to compare to."""

    out_features: int
    in_features: int
    rows: int
    regime: str
    contender: Contender
    timing: Timing
    error: float
    over_torch: float | None
    over_ours: dict[str, float | None]

    @property
    def bpw(self) -> float:
        return 8 * self.contender.bytes / (self.out_features * self.in_features)

    @property
    def gigabytes_per_second(self) -> float:
        return self.contender.bytes / self.timing.median / 1e9

    def to_json(self) -> dict[str, Any]:
        low, high = self.timing.quartiles
        return {
            "shape": f"{self.out_features}x{self.in_features}",
            "rows": self.rows,
            "regime": self.regime,
            "peer": self.contender.peer,
            "product": self.contender.name,
            "activations": self.contender.activations,
            "bpw": round(self.bpw, 4),
            "bytes": self.contender.bytes,
            "matrices": len(self.contender.calls) if self.regime == "memory" else 1,
            "median_ms": _rounded(1e3 * self.timing.median),
            "quartiles_ms": [_rounded(1e3 * low), _rounded(1e3 * high)],
            "gigabytes_per_second": _rounded(self.gigabytes_per_second),
            "times_faster_than_torch_bf16": _rounded(self.over_torch),
            "ours_times_faster": {name: _rounded(ratio) for name, ratio in self.over_ours.items()},
            "relative_error": _rounded(self.error),
        }


def compare(
    contenders: Sequence[Contender],
    timings: Sequence[Timing],
    errors: Sequence[float],
    *,
    shape: tuple[int, int],
    rows: int,
    regime: str,
) -> list[Result]:
    """Timings with their ratios to torch and to ours at the same bits."""
    baseline = next((t for c, t in zip(contenders, timings, strict=True) if c.name == BASELINE), None)
    ours = {
        (c.bits, c.activations): t for c, t in zip(contenders, timings, strict=True) if c.peer == "ours"
    }  # (bits, activations) -> timing
    results = []
    for contender, timing, error in zip(contenders, timings, errors, strict=True):
        pairs: dict[str, float | None] = dict.fromkeys(OURS)
        if contender.peer != "ours":
            for name in OURS:
                mine = ours.get((contender.bits, name))
                pairs[name] = None if mine is None else mine.times_faster_than(timing)
        over_torch = None if baseline is None else timing.times_faster_than(baseline)
        results.append(Result(*shape, rows, regime, contender, timing, error, over_torch, pairs))
    return results


def table(results: Sequence[Result]) -> str:
    first = results[0]
    lines = []
    for result in results:
        low, high = result.timing.quartiles
        lines.append(
            [
                result.contender.name,
                result.contender.activations,
                f"{result.bpw:.3f}",
                f"{result.contender.bytes / 1e6:.2f}",
                f"{1e3 * result.timing.median:.4f}",
                f"{1e3 * low:.4f}-{1e3 * high:.4f}",
                f"{result.gigabytes_per_second:.1f}",
                optional(result.over_torch, 2),
                *(optional(result.over_ours[name], 2) for name in OURS),
                f"{100 * result.error:.2f}%",
            ]
        )
    title = f"{first.out_features}x{first.in_features}, {first.rows} rows, from {first.regime}"
    return render(title, COLUMNS, lines)


def _rounded(value: float | None) -> float | None:
    """Five digits are more than any of these is worth."""
    return None if value is None else float(f"{value:.5g}")
