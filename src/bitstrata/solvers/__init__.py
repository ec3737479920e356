"""Weights -> planes, pure mathematics: one file a method, and the steps that methods share.

A new method is one file with a subclass of `Method`, and its entry in `METHODS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from numbers import Real
from typing import Any

from ..arguments import shown
from ..errors import UsageError
from ..planes import whole_number
from .anybcq import AnyBCQ
from .anyprecision import AnyPrecision
from .bcq import BCQ
from .bpdq import BPDQ
from .gptq import GPTQ
from .method import Block, Method, Need, Tuning
from .moments import Moments
from .nested import Nested
from .rtn import RTN

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (AnyBCQ, AnyPrecision, BCQ, BPDQ, GPTQ, Nested, RTN)
}
PRESETS = ("fast", "default", "best")

__all__ = [
    "BCQ",
    "BPDQ",
    "GPTQ",
    "METHODS",
    "PRESETS",
    "RTN",
    "AnyBCQ",
    "AnyPrecision",
    "Block",
    "Method",
    "Moments",
    "Need",
    "Nested",
    "Tuning",
    "make_method",
]


def make_method(name: str, preset: str, overrides: Mapping[str, str | Any]) -> Method:
    """The method `name` with the options of `preset` and `overrides` on top.

    `overrides` may hold strings from a command line; they are converted to the option's type.
    Raises UsageError for an unknown method, preset or option, or a value of the wrong type.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise UsageError(f"unknown method {shown(name)}", hint=f"methods: {', '.join(sorted(METHODS))}")
    if preset not in PRESETS:
        raise UsageError(f"unknown preset {shown(preset)}", hint=f"presets: {', '.join(PRESETS)}")
    if not isinstance(overrides, Mapping):
        raise UsageError(f"options must be a dictionary, got {shown(overrides)}", hint='such as {"steps": 500}')
    method = METHODS[name]
    values: dict[str, Any] = dict(method.presets.get(preset, {}))
    defaults = {field.name: field.default for field in dataclasses.fields(method)}
    for key, value in overrides.items():
        if key not in defaults:
            raise UsageError(f"method {name} has no option {key!r}", hint=f"options: {', '.join(defaults) or 'none'}")
        values[key] = _convert(f"option {key} of {name}", value, defaults[key])
    try:
        return method(**values)
    except ValueError as error:
        raise UsageError(f"method {name}: {error}") from error


def _convert(what: str, value: Any, default: Any) -> Any:
    wanted = type(default)
    if not isinstance(value, str):
        whole = whole_number(value)
        if wanted is int and whole is not None:
            return whole
        if type(value) is wanted or (wanted is float and (whole is not None or isinstance(value, Real))):
            return wanted(value)
    elif wanted is bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    elif wanted is not bool:
        try:
            return wanted(value)
        except ValueError:
            pass
    raise UsageError(f"{what} must be {wanted.__name__}, got {shown(value)}", hint=f"the default is {default}")
