"""`bitstrata bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..benchmark import bench
from .output import DEVICE_OPTION, JSON_OPTION, show


def command(
    model: Annotated[str | None, typer.Argument(help="Checkpoint, OUT or OUT:BITS; or use --shapes.")] = None,
    shapes: Annotated[
        str | None,
        typer.Option(help="Instead of a checkpoint: llama-3.2-1b, llama-3.1-8b, ... or 4096x4096,14336x4096."),
    ] = None,
    bits: Annotated[str | None, typer.Option(help="Precisions, such as 2,3,4; all of OUT's by default.")] = None,
    rows: Annotated[str, typer.Option(help="Rows of activations for single layers.")] = "1,8",
    threads: Annotated[int | None, typer.Option(help="Threads; what torch uses by default.")] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="With a model's name in --shapes: decode a whole model too.")
    ] = False,
    head_bits: Annotated[
        int | None, typer.Option(help="With --whole: planes for the output head and the embedding; bf16 otherwise.")
    ] = None,
    blocks: Annotated[int | None, typer.Option(help="With --whole: only as many decoder blocks.")] = None,
    regime: Annotated[str, typer.Option(help="cache, memory, or both.")] = "both",
    rounds: Annotated[int, typer.Option(help="Rounds of which the median is taken.")] = 7,
    device: str = DEVICE_OPTION,
    tune: Annotated[
        bool, typer.Option("--tune", help="On a GPU: first search the fastest shapes of programs, and keep them.")
    ] = False,
    json: bool = JSON_OPTION,
) -> None:
    """Check the kernels, then time them beside memory bandwidth and torch."""
    result = bench(
        model,
        shapes=shapes,
        bits=bits,
        rows=rows,
        threads=threads,
        whole=whole,
        head_bits=head_bits,
        blocks=blocks,
        regimes=("cache", "memory") if regime == "both" else (regime,),
        rounds=rounds,
        device=device,
        tune=tune,
    )
    show(result, as_json=json)
