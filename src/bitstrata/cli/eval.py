"""`bitstrata eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..evaluation import evaluate
from .output import DEVICE_OPTION, JSON_OPTION, show


def command(
    model: Annotated[Path, typer.Argument(help="Checkpoint folder or hub id.")],
    text: Annotated[str, typer.Option(help="UTF-8 text, documents separated by <|endoftext|>; or stdlib.")],
    bits: Annotated[
        str | None, typer.Option(help="Bits and plans to measure: 2,3,plan.json. All bits by default.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="The original model, for kld and agreement.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a window (default 2048).")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after so many predicted tokens.")] = None,
    arithmetic: Annotated[
        str | None,
        typer.Option(help="exact, or int8 as in decoding on a CPU. By default what runs for windows of this length."),
    ] = None,
    device: str = DEVICE_OPTION,
    json: bool = JSON_OPTION,
) -> None:
    """Measure perplexity, KL divergence and top-1 agreement at each bits."""
    result = evaluate(
        model,
        text,
        bits=bits,
        reference=reference,
        seq_len=seq_len,
        max_tokens=max_tokens,
        arithmetic=arithmetic,
        device=device,
    )
    show(result, as_json=json)
