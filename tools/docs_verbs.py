"""For the reference (mkdocs.yml): the arguments of verbs, which come from their options and not from their source."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import griffe


class Verbs(griffe.Extension):
    """Gives functions under the decorator `verb` the signature and the docstring that they have when they run."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        if not any(str(decorator.value).startswith("verb(") for decorator in func.decorators):
            return
        real = getattr(importlib.import_module(func.module.path), func.name)
        func.docstring = griffe.Docstring(inspect.getdoc(real) or "", parent=func)
        func.parameters = griffe.Parameters(
            *(
                griffe.Parameter(
                    one.name,
                    annotation=inspect.formatannotation(one.annotation),
                    kind=griffe.ParameterKind[one.kind.name.lower()],
                    default=None if one.default is inspect.Parameter.empty else repr(one.default),
                )
                for one in inspect.signature(real).parameters.values()
            )
        )
