"""What a quantization job found out: prints as a table, saved as `bitstrata_report.json`.

The saved part holds only what the inputs determine, so that equal inputs give equal bytes; time and
memory are in the returned object alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError

from ..checkpoint.reader import read_json
from ..errors import CheckpointError
from ..metrics import Metrics
from ..solvers.method import MomentsMethod
from ..tables import optional, percent, render
from .chains import ORIGINAL, baseline
from .context import Prepared
from .expert_inputs import prior_share

MEASURES = ("nll", "kld", "top1_agreement")

# A precision whose top token differs from the original's this often is called not worth using.
USELESS_TOP1 = 0.5

# Of what guessing tokens at random loses. Models lose 0.15 to 0.3 of it on text of their own kind, and 0.6 to 1.4 on
# foreign text: TinyStories models on Wikipedia and Python, a Python model on TinyStories and Wikipedia.
FOREIGN_TEXT = 0.5

LEANING = 0.5  # of an expert's inputs: known more from its layer's than from its own tokens

# of a report: what is not saved, because it is not the same for equal inputs
VOLATILE = {"output", "process", "seconds", "peak_memory_bytes", "total_bytes"}


class _Row(BaseModel):
    bits: int
    bpw_read: float = 0.0
    bytes: int = 0
    nll: float | None = None
    kld: float | None = None
    top1_agreement: float | None = None
    rtn: dict[str, float | None] | None = None
    verdict: str = ""


class _LeftOut(BaseModel):
    name: str
    shape: list[int]
    reason: str


class _Experts(BaseModel):
    tokens: list[int]
    prior: list[float] | None = None


class _Saved(BaseModel):
    """What is read of a `bitstrata_report.json`; only what it does hold is used."""

    reference: dict[str, float] | None = None
    heldout_tokens: int = 0
    results: list[_Row] = []
    layer_error: dict[str, dict[str, float]] = {}
    experts: dict[str, _Experts] = {}
    left_out: tuple[_LeftOut, ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()
    text_warning: str | None = None


@dataclass(frozen=True)
class Report:
    """The result of `bitstrata.quantize`.

    results: one entry a bits value: bpw_read, bytes, and on held-out windows nll, kld, top1_agreement,
        the same for dedicated round-to-nearest under `rtn`, and a `verdict` in words. The measured
        values are None when no text was given.
    text_warning: what is wrong with the calibration text, by the original's own loss on its held-out windows.
    process: which of several returned it; the one with number 0 speaks for all.
    head_bits: of the output head and the embedding; None if they are as they were. `bytes` counts the head.
    layer_error: layer -> bits -> ||W - W_bits||^2 / ||W||^2.
    experts: module of experts -> `tokens` of the calibration text that each expert got in the original; `prior`, how
        much its inputs, known from these, were drawn towards all that the layer reads (quantization/expert_inputs.py).
    """

    output: str
    method: str
    group_size: int
    results: tuple[dict[str, Any], ...]
    reference: dict[str, float] | None
    heldout_tokens: int
    layer_error: Mapping[str, Mapping[str, float]]
    experts: Mapping[str, Mapping[str, Any]]
    left_out: tuple[dict[str, Any], ...]
    tied: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    text_warning: str | None = None
    head_bits: int | None = None
    total_bytes: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    process: int = 0

    def saved(self) -> dict[str, Any]:
        """What goes into `bitstrata_report.json`."""
        return {key: value for key, value in self.to_json().items() if key not in VOLATILE}

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def with_saved(self, path: Path) -> Report:
        """This report with the measures that an earlier run, of whatever version, saved in `path`.

        What is not there or not known stays as it is here. Raises CheckpointError if it is no report.
        """
        saved = read_json(path)
        try:
            found = _Saved.model_validate(saved).model_dump(exclude_unset=True)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"{path} is not a report: {place}: {first['msg']}") from error
        rows = {row["bits"]: row for row in found.pop("results", [])}
        results = tuple({**row, **rows.get(row["bits"], {})} for row in self.results)
        return replace(self, results=results, **found)

    def __str__(self) -> str:
        rows = []
        if self.reference is not None:
            rows.append(["original", "", "", f"{self.reference['nll']:.4f}", "", "", "", ""])
        for row in self.results:
            rtn = row["rtn"] or {}
            measures = [optional(row["nll"]), optional(row["kld"]), percent(row["top1_agreement"])]
            plain = [optional(rtn.get("nll")), optional(rtn.get("kld"))]
            rows.append([str(row["bits"]), f"{row['bpw_read']:.3f}", f"{row['bytes'] / 1e6:.2f}", *measures, *plain])
        columns = ["bits", "bpw read", "MB read", "nll", "kld", "top-1", "rtn nll", "rtn kld"]
        where = f", measured on {self.heldout_tokens} held-out tokens" if self.heldout_tokens else ""
        head = "" if self.head_bits is None else f", head and embedding at {self.head_bits} bits"
        lines = [render(f"{self.output}: {self.method}, group size {self.group_size}{head}{where}", columns, rows)]
        lines += [f"bits {row['bits']}: {row['verdict']}" for row in self.results if row["verdict"] != "ok"]
        if self.experts:
            lines.append(_routing_line(self.experts))
        if self.text_warning:
            lines.append(self.text_warning)
        reasons = Counter(entry["reason"] for entry in self.left_out)
        if reasons:
            lines.append("not quantized: " + ", ".join(f"{count} x {reason}" for reason, count in reasons.items()))
        return "\n".join(lines)


def make_report(
    prepared: Prepared,
    notes: Sequence[str],
    measured: Mapping[str, Metrics] = MappingProxyType({}),
    layer_error: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
    routing: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> Report:
    """Put a report together; `measured` has an entry a chain, or none if nothing was measured."""
    settings, discovery, spec = prepared.settings, prepared.discovery, prepared.spec()
    rows = []
    lower: Metrics | None = None
    unmeasured = "not measured" + ("" if prepared.windows is not None else ": no calibration text was given")
    for bits in settings.bits:
        size = spec.bytes_read(bits)
        mine, rtn = measured.get(str(bits)), measured.get(baseline(bits))
        rows.append(
            {
                "bits": bits,
                "bpw_read": 8 * size / spec.weights_read,
                "bytes": size,
                **{name: getattr(mine, name, None) for name in MEASURES},
                "rtn": None if rtn is None else {name: getattr(rtn, name) for name in MEASURES},
                "verdict": unmeasured if mine is None else verdict(bits, mine, rtn, lower),
            }
        )
        lower = mine
    original = measured.get(ORIGINAL)
    return Report(
        output=str(settings.output),
        method=settings.method.name,
        group_size=settings.group_size,
        results=tuple(rows),
        reference=None if original is None else {"nll": original.nll, "perplexity": original.perplexity},
        heldout_tokens=0 if original is None else original.tokens,
        layer_error={name: layer_error[name] for name in spec.linears if name in layer_error},
        experts=_experts(prepared, routing),
        left_out=tuple({"name": x.name, "shape": list(x.shape), "reason": x.reason} for x in discovery.left_out),
        tied=discovery.tied,
        notes=tuple(notes),
        text_warning=None if original is None else text_warning(original.nll, prepared.vocabulary),
        head_bits=settings.head_bits,
    )


def _experts(prepared: Prepared, routing: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
    """What the report says of modules of experts, each with the tokens that its experts got."""
    leans = isinstance(prepared.settings.method, MomentsMethod)
    inputs = {linear.name.rpartition(".")[0]: linear.in_features for linear in prepared.discovery.linears[::-1]}
    found = {}
    for name, tokens in routing.items():
        prior = [prior_share(count, inputs[f"{name}.{e}"]) for e, count in enumerate(tokens) if f"{name}.{e}" in inputs]
        found[name] = {"tokens": list(tokens), "prior": prior if leans and prior else None}
    return found


def _routing_line(experts: Mapping[str, Mapping[str, Any]]) -> str:
    tokens = sorted(count for of in experts.values() for count in of["tokens"])
    line = (
        f"{len(tokens)} experts saw {tokens[0]} to {tokens[-1]} tokens each of the calibration text, "
        f"{tokens[len(tokens) // 2]} in the middle"
    )
    prior = [share for of in experts.values() for share in of["prior"] or ()]
    leaning = sum(share > LEANING for share in prior)
    return line + (f"; {leaning} lean on their layer's inputs by more than half" if leaning else "")


def text_warning(nll: float, vocabulary: int) -> str | None:
    """One sentence if the original model cannot predict the text, so that nothing can be learnt from it."""
    guessing = math.log(vocabulary)
    if nll < FOREIGN_TEXT * guessing:
        return None
    return (
        f"warning: the original itself loses {nll:.2f} nats a token on the held-out part of the calibration text "
        f"(guessing: {guessing:.2f}); it is not the kind of text this model was made for, so precisions fitted to it "
        "may be poor on other text: calibrate on what the model will see"
    )


def verdict(bits: int, measured: Metrics, rtn: Metrics | None, lower: Metrics | None) -> str:
    """One sentence on whether `bits` is worth using; "ok" if nothing is wrong with it."""
    assert measured.kld is not None
    assert measured.top1_agreement is not None
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
