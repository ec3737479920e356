"""Grammars of calls: a reply that must call one of some functions, with arguments of its schema, or that may."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ...models import added_tokens
from ..constraints import Constraint, json_rule, quoted
from .formats import DeepSeek, Llama, Mistral, ToolFormat
from .shown import Tool

MOST_CALLS = 16  # in one reply


def forced_calls(
    tokenizer: PreTrainedTokenizerBase, form: ToolFormat, tools: Sequence[Tool], *, most: int = MOST_CALLS
) -> Constraint:
    """Replies that are one call of `tools`, or up to `most`, and nothing else.

    Keywords of a schema that cannot be enforced are left out unless its tool is strict. Raises UsageError as
    Constraint.
    """
    return Constraint("lark", f"start: calls\n{_rules(tokenizer, form, tools, most)}")


def calls_or(
    tokenizer: PreTrainedTokenizerBase, form: ToolFormat, tools: Sequence[Tool], otherwise: str, *, most: int
) -> Constraint:
    """Replies that are up to `most` calls of `tools`, or else what the rule `otherwise` says."""
    rules = _rules(tokenizer, form, tools, most)
    return Constraint("lark", f"start: calls | otherwise\notherwise: {otherwise}\n{rules}")


def _rules(tokenizer: PreTrainedTokenizerBase, form: ToolFormat, tools: Sequence[Tool], most: int) -> str:
    arguments = "".join(
        f"arguments{at}: {json_rule(tool.parameters or {'type': 'object'}, strict=tool.strict)}\n"
        for at, tool in enumerate(tools)
    )

    def mark(text: str) -> str:
        return _mark(tokenizer, text)

    def each(before: str, between: str, after: str) -> str:
        """Every tool's call."""
        ways = (f"{before} {quoted(tool.name)} {between} arguments{at} {after}" for at, tool in enumerate(tools))
        return " | ".join(ways)

    def objects(key: str) -> str:
        begun = (quoted(f'{{"name": {quoted(tool.name)}, "{key}": ') for tool in tools)
        return " | ".join(f'{begin} arguments{at} "}}"' for at, begin in enumerate(begun))

    more = f"{{0,{most - 1}}}" if most > 1 else ""
    if isinstance(form, Mistral):
        separate = mark("[ARGS]") if "[ARGS]" in form.shown(tokenizer).values() else None
        if separate is None:
            repeat = f'(", " call){more}' if more else ""
            return f'calls: {mark("[TOOL_CALLS]")} "[" call {repeat} "]"\ncall: {objects("arguments")}\n{arguments}'
        one = each(mark("[TOOL_CALLS]"), separate, "")
        return f"calls: call {f'call{more}' if more else ''}\ncall: {one}\n{arguments}"
    if isinstance(form, DeepSeek):
        one = each(mark(form.begin), mark(form.separator), mark(form.end))
        if "```json" in str(tokenizer.get_chat_template()):
            kind = f'{mark(form.begin)} "function" {mark(form.separator)}'
            one = each(kind, quoted("\n```json\n"), f"{quoted(chr(10) + '```')} {mark(form.end)}")
        repeat = f'("\\n"? call){more}' if more else ""
        return f"calls: {mark(form.openings[0])} call {repeat} {mark(form.last)}\ncall: {one}\n{arguments}"
    if isinstance(form, Llama):
        repeat = f'("; " call){more}' if more else ""
        return f"calls: call {repeat}\ncall: {objects('parameters')}\n{arguments}"
    repeat = f'("\\n" call){more}' if more else ""
    call = f'{mark("<tool_call>")} "\\n" object "\\n" {mark("</tool_call>")}'
    return f"calls: call {repeat}\ncall: {call}\nobject: {objects('arguments')}\n{arguments}"


def _mark(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A mark of a format: the token where it is a special one, else its text."""
    for number, token in added_tokens(tokenizer).items():
        if token.special and token.content == text:
            return f"<[{number}]>"
    return quoted(text)
