"""What a reply must be: a JSON schema, a regular expression, one of some texts, a grammar.

    Request(prompt_ids, constraint=Constraint.json_schema({"type": "object", ...}))
    bitstrata.generate(OUT, "...", constraint=Constraint.choice(["yes", "no"]))

A constraint is a description. The library llguidance turns it into masks over the vocabulary (batching/masks.py): at
each place only those tokens can be picked after which the reply can still become such a text, and where it can become
nothing longer it ends. A reply that is cut by its number of tokens is the beginning of such a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UsageError

Kind = Literal["json", "regex", "lark", "grammar"]
MOST_SCHEMA = 200_000  # characters of a JSON schema, or of all choices
MOST_GRAMMAR = 32_000  # characters of a grammar or an expression
MOST_TERMINALS = 200  # of a grammar: each may be made of all others
MOST_DEPTH = 64  # of a schema
WHITESPACE = "[ ]?"  # more of it, and a model may go on with nothing else; and every token of it costs a step
_TERMINAL = re.compile(r"^\s*[A-Z_][A-Z0-9_]*(?:\.-?\d+)?\s*(?:\[[^\]]*\])?\s*:(?!:)", re.MULTILINE)
_NAMES = {"json": "the JSON schema", "regex": "the expression", "lark": "the grammar", "grammar": "the grammar"}


@dataclass(frozen=True)
class Constraint:
    """One of the kinds of texts above; equal ones are compiled once. To be made by the class methods.

    source: a rule of llguidance's Lark (json), an expression, a grammar in Lark, or one in Lark or GBNF (grammar).
    """

    kind: Kind
    source: str

    @classmethod
    def json_schema(
        cls, schema: Mapping[str, Any] | bool, *, strict: bool = True, whitespace: str | None = WHITESPACE
    ) -> Constraint:
        """JSON that is valid against `schema`.

        Args:
            strict: keywords that cannot be enforced are an error; else they are left out, with a warning.
            whitespace: an expression for what may stand between tokens of JSON; None for nothing.

        Raises UsageError for a schema that is too large, nested too deep, or no JSON.
        """
        return cls("json", json_rule(schema, strict=strict, whitespace=whitespace))

    @classmethod
    def json_object(cls) -> Constraint:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """A text that `pattern` matches as a whole, in the syntax of Rust's regex: no look-around, no references.

        Raises UsageError for a pattern that is too long.
        """
        _check_length(pattern, MOST_GRAMMAR, "the expression")
        return cls("regex", pattern)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Constraint:
        """One of `texts`. Raises UsageError if there are none, or too many, or one is empty."""
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise UsageError("a choice needs at least one text, and none that is empty")
        rule = " | ".join(map(quoted, texts))
        _check_length(rule, MOST_SCHEMA, "the choice")
        return cls("lark", f"start: {rule}\n")

    @classmethod
    def grammar(cls, text: str) -> Constraint:
        """A text of a context-free grammar in llguidance's Lark, which begins at `start`, or in GBNF, at `root`.

        Raises UsageError for one that is too long, or that names too many terminals.
        """
        _check_length(text, MOST_GRAMMAR, "the grammar")
        if (count := len(_TERMINAL.findall(text))) > MOST_TERMINALS:
            raise UsageError(f"the grammar has {count} terminals", hint=f"at most {MOST_TERMINALS} are read")
        return cls("grammar", text)

    @property
    def what(self) -> str:
        """In words."""
        return _NAMES[self.kind]


def json_rule(schema: Mapping[str, Any] | bool, *, strict: bool = True, whitespace: str | None = WHITESPACE) -> str:
    """What a grammar in Lark calls JSON of `schema`; arguments and errors as of Constraint.json_schema."""
    if not isinstance(schema, Mapping | bool):
        raise UsageError(f"a JSON schema is an object or a truth value, not {type(schema).__name__}")
    _check_depth(schema)
    options: dict[str, Any] = {"lenient": not strict, "whitespace_flexible": whitespace is not None}
    if whitespace is not None:
        options["whitespace_pattern"] = whitespace
    whole = {"not": {}} if schema is False else {**(schema if isinstance(schema, Mapping) else {})}
    try:
        text = json.dumps({**whole, "x-guidance": options}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the JSON schema is no JSON: {error}") from error
    _check_length(text, MOST_SCHEMA, "the JSON schema")
    return f"%json {text}"


def quoted(text: str) -> str:
    """`text` as a literal of a grammar. Raises UsageError for half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("a text of the constraint holds half a surrogate pair") from None
    return json.dumps(text, ensure_ascii=False)


def _check_length(text: str, most: int, what: str) -> None:
    if len(text) > most:
        raise UsageError(f"{what} has {len(text)} characters", hint=f"at most {most} are read")


def _check_depth(schema: Any) -> None:
    level = [schema]
    for _ in range(MOST_DEPTH):
        nested: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                nested += item.values()
            elif isinstance(item, list | tuple):
                nested += item
        if not nested:
            return
        level = nested
    raise UsageError(f"the JSON schema is nested more than {MOST_DEPTH} deep", hint="make it simpler")
