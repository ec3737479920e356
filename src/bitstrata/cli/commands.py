"""A command for every verb, made from the fields of its options (options.py). Nothing heavy is imported for --help."""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import typer

from .. import options
from ..options import Argument, arguments_of
from .output import show

JSON = typer.Option(False, "--json", help="Print one JSON object on stdout.")
VERBS: dict[str, tuple[type, str]] = {  # name -> its options, and the function that runs it: room:name
    "demo": (options.DemoOptions, "demonstration:demo"),
    "quantize": (options.QuantizeOptions, "quantization:quantize"),
    "plan": (options.PlanOptions, "allocation:plan"),
    "eval": (options.EvaluateOptions, "evaluation:evaluate"),
    "generate": (options.GenerateCommand, "cli.generate:run"),
    "chat": (options.ChatCommand, "cli.chat:run"),
    "serve": (options.ServeOptions, "cli.serve:run"),
    "inspect": (options.InspectOptions, "runtime:inspect"),
    "export": (options.ExportOptions, "exchange:export_model"),
    "import": (options.ImportOptions, "exchange:import_model"),
    "push": (options.PushOptions, "models:push"),
    "bench": (options.BenchOptions, "benchmark:bench"),
    "env": (options.EnvOptions, "runtime:env"),
}


def command(kind: type, target: str) -> Callable[..., None]:
    """What typer calls for a verb. A `run` in cli/ shows its result itself, other results are shown here."""
    known = arguments_of(kind)
    shows = not target.startswith("cli.")

    def call(**given: Any) -> None:
        as_json = given.pop("json", False) if shows else False
        values = {}
        for name, value in given.items():
            each = known[name][1].each
            if value is not None and each is not None:
                value = each(_flag(name, known[name][1]), value)
            if value is not None:
                values[name] = value
        room, name = target.split(":")
        run = getattr(importlib.import_module(f"bitstrata.{room}"), name)
        result = run(kind(**values))
        if shows and not getattr(result, "process", 0):  # of several processes one speaks
            show(result, as_json=as_json)

    defaults = {one.name: one.default for one in inspect.signature(kind).parameters.values()}
    parameters = [
        _parameter(name, *known[name], defaults[name])
        for name in sorted(known, key=lambda name: name not in kind.__annotations__)  # its own before those it inherits
        if known[name][1].is_command
    ]
    if shows:
        parameters.append(inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=JSON, annotation=bool))
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {one.name: one.annotation for one in parameters}
    call.__doc__ = kind.__doc__
    return call


def _flag(name: str, about: Argument) -> str:
    return f"--{name.replace('_', '-')}" if about.flag is None else about.flag


def _parameter(name: str, hint: Any, about: Argument, default: Any) -> inspect.Parameter:
    """A field as typer wants it."""
    is_given = default is inspect.Parameter.empty
    kinds = set(get_args(hint) if isinstance(hint, types.UnionType) else (hint,))
    kind: Any = next((one for one in (bool, float, int) if kinds <= {one, type(None)}), str)
    bounded: dict[str, Any] = {"min": about.least, "max": about.most, "help": about.help}
    if about.flag == "":
        shown = typer.Argument(... if is_given else default, **bounded)
    else:
        flags = [*([about.short] if about.short else []), _flag(name, about)]
        shown = typer.Option(
            ... if is_given else None if about.each else default,
            *flags,
            envvar=about.environment,
            metavar="PATH" if Path in kinds else None,
            **bounded,
        )
    if about.each:
        kind = list[str]
    annotation = kind if is_given or (default is not None and not about.each) else kind | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=shown, annotation=annotation)
