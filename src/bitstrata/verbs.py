"""A public function from the arguments of its verb (options.py), and words for arguments that it does not have."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, Protocol, TypeVar, cast, overload

from .errors import UsageError
from .options import arguments_of

P = ParamSpec("P")
O = TypeVar("O")  # noqa: E741  (options)
O_contra = TypeVar("O_contra", contravariant=True)
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
REMOVED = {
    "reporter": "messages go to logging: nothing is shown without logging.basicConfig(level=logging.INFO) or the like"
}


def check_name(function: str, name: str, known: Iterable[str]) -> None:
    """Raise UsageError for an argument that `function` does not have; the nearest that it has is named."""
    known = tuple(known)
    if name in known:
        return
    near = difflib.get_close_matches(name, known, 1)
    hint = REMOVED.get(name) or (f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}")
    raise UsageError(f"{function} has no argument {name}", hint=hint)


def named(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which says in words which argument it does not have. A decorator of public functions."""
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            check_name(function.__name__, name, known)
        return function(*args, **kwargs)

    return checked


class Verb(Protocol[O_contra, P, R_co]):
    """A function that takes one object of options, or the fields of one as arguments."""

    __name__: str

    @overload
    def __call__(self, options: O_contra, /) -> R_co: ...

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


def verb(options: Callable[P, O]) -> Callable[[Callable[[O], R]], Verb[O, P, R]]:
    """A decorator: `run(options)` becomes a function that also takes the fields of `options` as its arguments.

    Its signature and the list of arguments in its docstring come from the fields. Raises UsageError for an argument
    that there is none of.
    """
    kind = cast("type[O]", options)
    signature = inspect.signature(kind)

    def decorate(run: Callable[[O], R]) -> Verb[O, P, R]:
        @functools.wraps(run)
        def call(*args: Any, **kwargs: Any) -> R:
            if len(args) == 1 and not kwargs and isinstance(args[0], kind):
                return run(args[0])
            for name in kwargs:
                check_name(run.__name__, name, signature.parameters)
            bound = signature.bind(*args, **kwargs)
            return run(kind(*bound.args, **bound.kwargs))

        known = arguments_of(kind)
        described = "\n".join(["Args:", *(f"    {name}: {about.help}" for name, (_, about) in known.items())])
        text, raises, errors = inspect.cleandoc(run.__doc__ or "").partition("\nRaises:")
        call.__doc__ = f"{text}\n{described}\n{raises}{errors}".strip() if known else text
        call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [one.replace(annotation=known[name][0]) for name, one in signature.parameters.items()],
            return_annotation=run.__annotations__["return"],
        )
        return cast("Verb[O, P, R]", call)

    return decorate
