"""`bitstrata quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..quantization import quantize
from .output import DEVICE_OPTION, JSON_OPTION, show


def command(
    model: Annotated[str, typer.Argument(help="Model folder (safetensors) or hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    bits: Annotated[str, typer.Option(help="Bits to support: 2-4, 2,4 or 3.")] = "2-4",
    method: Annotated[str, typer.Option(help="nested, anybcq, anyprecision, bpdq, gptq, bcq or rtn.")] = "nested",
    group_size: Annotated[int, typer.Option(help="Input columns that share scales.")] = 128,
    calibration: Annotated[str | None, typer.Option(help="UTF-8 text file, or stdlib.")] = None,
    num_samples: Annotated[int, typer.Option(help="Windows to calibrate on.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens a window.")] = 2048,
    preset: Annotated[str, typer.Option(help="fast (no calibration text), default or best (slowest).")] = "default",
    head_bits: Annotated[
        int | None,
        typer.Option(help="Planes for the output head and the embedding too, 4 to 8; else they stay as they are."),
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help="Method option NAME=VALUE; repeatable.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Layers to leave: a glob, or re:REGEX; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Decides windows and training order.")] = 0,
    device: str = DEVICE_OPTION,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list everything; write nothing.")] = False,
    json: bool = JSON_OPTION,
) -> None:
    """Quantize MODEL into nested bit-planes. Run the same command again to resume an interrupted job."""
    options = {}
    for item in option or ():
        name, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"--option {item!r} must look like NAME=VALUE", hint="for example --option steps=500")
        options[name] = value
    report = quantize(
        model,
        output,
        bits=bits,
        method=method,
        group_size=group_size,
        calibration=calibration,
        num_samples=num_samples,
        seq_len=seq_len,
        preset=preset,
        head_bits=head_bits,
        skip=skip or (),
        seed=seed,
        device=device,
        dry_run=dry_run,
        options=options,
    )
    show(report, as_json=json)
