"""`bitstrata plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from ..allocation import SOLVERS, Measure, plan
from ..errors import UsageError
from .output import DEVICE_OPTION, JSON_OPTION, show


def command(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    budget: Annotated[str, typer.Option(help="All weights: 600MB, 1.8GiB. Or bits read a weight: 3.2bpw.")],
    text: Annotated[
        str | None,
        typer.Option(help="UTF-8 text to measure layers and the plan on; or stdlib. Once measured, optional."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="The original model; else losses are to the highest bits.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the plan is written.")] = None,
    solver: Annotated[str, typer.Option(help=f"One of: {', '.join(SOLVERS)}.")] = "paired",
    pages: Annotated[
        bool, typer.Option("--pages", help="Write the universal order of pages beside the model.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw loss against bytes to this file.")] = None,
    sensitivity: Annotated[
        Path | None, typer.Option(help="Where layers' losses are kept; beside the model by default.")
    ] = None,
    measure: Annotated[
        str | None, typer.Option(help="How layers are measured: kld (default), or hessian (quick, rough).")
    ] = None,
    together: Annotated[
        bool, typer.Option("--together", help="Equal bits for q, k, v and for gate, up: they share a kernel call.")
    ] = False,
    min_bits: Annotated[
        list[str] | None, typer.Option(help="At least so many bits: 3, or '*.down_proj=3'. May be repeated.")
    ] = None,
    max_bits: Annotated[list[str] | None, typer.Option(help="At most so many bits, likewise.")] = None,
    windows: Annotated[
        int | None, typer.Option(help="Windows to measure on, and as many to compare on (default 16).")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a window (default 512).")] = None,
    seed: Annotated[int, typer.Option(help="Which windows, and which random plan.")] = 0,
    device: str = DEVICE_OPTION,
    json: bool = JSON_OPTION,
) -> None:
    """Choose the bits of every layer for a budget in bytes or bits a weight."""
    if measure not in (None, "kld", "hessian"):
        raise UsageError(f"--measure {measure!r} is not known", hint="use kld or hessian")
    result = plan(
        model,
        budget,
        solver,
        text,
        reference,
        output=output,
        pages=pages,
        plot=plot,
        sensitivity=sensitivity,
        measure=cast(Measure | None, measure),
        together=together,
        min_bits=_bounds("--min-bits", min_bits),
        max_bits=_bounds("--max-bits", max_bits),
        windows=windows,
        seq_len=seq_len,
        seed=seed,
        device=device,
    )
    show(result, as_json=json)


def _bounds(option: str, given: list[str] | None) -> dict[str, int]:
    """`PATTERN=BITS` or `BITS` for all layers, as a mapping. Raises UsageError for anything else."""
    found: dict[str, int] = {}
    for text in given or []:
        pattern, _, bits = text.rpartition("=")
        if not bits.isdigit():
            raise UsageError(f"{option} {text!r} cannot be used", hint=f"{option} 3, or {option} '*.down_proj=3'")
        found.pop(pattern or "*", None)  # a key that is there keeps its place, but the last that matches holds
        found[pattern or "*"] = int(bits)
    return found
