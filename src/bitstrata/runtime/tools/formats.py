"""The forms in which models write calls of functions, and how each is read: the text so far -> the calls so far.

What is read of the beginning of a text is the beginning of what is read of the whole.

    hermes      <tool_call>{"name": ..., "arguments": {...}}</tool_call>   Hermes, Qwen (Qwen-Coder: tags)
    llama       {"name": ..., "parameters": {...}}, or [name(argument=...)]    Llama 3.1 and later
                <|python_tag|>name.call(argument=...)    functions that Llama 3.1 has been trained with
    mistral     [TOOL_CALLS][{"name": ..., "arguments": {...}}], or [TOOL_CALLS]name[ARGS]{...}
    deepseek    <|tool_calls_begin|><|tool_call_begin|>name<|tool_sep|>{...}<|tool_call_end|>..., in its own characters
"""

from __future__ import annotations

import ast
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from ...models import added_tokens
from .scanning import ScannedObject, is_whole_value, scan_object


@dataclass(frozen=True)
class Call:
    """name: whole. arguments: JSON, as far as it has come."""

    name: str
    arguments: str = ""


@dataclass(frozen=True)
class Found:
    """What a text that may begin with calls is: `calls` up to `end`, None while more of them can come."""

    calls: tuple[Call, ...] = ()
    end: int | None = None


class ToolFormat(ABC):
    """openings: texts that begin calls. marks: all texts that may be special tokens. bare: what a reply that begins
    with calls without an opening begins with.
    """

    name: ClassVar[str]
    openings: ClassVar[tuple[str, ...]]
    marks: ClassVar[tuple[str, ...]] = ()
    bare: ClassVar[re.Pattern[str] | None] = None

    @abstractmethod
    def recognise(self, template: str) -> bool:
        """Whether a chat template asks for this form."""

    @abstractmethod
    def read(self, text: str, final: bool) -> Found | None:
        """The calls of `text`, which begins with an opening or as `bare`; None if it is none. final: it is whole."""

    def shown(self, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
        """Special tokens that belong to calls, and their texts, which decoded text leaves out."""
        return {
            number: token.content
            for number, token in added_tokens(tokenizer).items()
            if token.special and token.content in (*self.openings, *self.marks)
        }


class Hermes(ToolFormat):
    name, openings, marks = "hermes", ("<tool_call>",), ("</tool_call>",)

    def recognise(self, template: str) -> bool:
        return "<tool_call>" in template

    def read(self, text: str, final: bool) -> Found | None:
        at = _space(text, len("<tool_call>"))
        if text[at : at + 1] == "{":
            one = _object_call(text, at)
            if one is None:
                return None
            call, end = one
            return Found(call, None if end is None else _past(text, end, "</tool_call>", final))
        if "<function=".startswith(text[at : at + 10]):
            end = text.find("</tool_call>", at)
            calls = tuple(_tagged_calls(text[at:end])) if end >= 0 else ()
            if end < 0 or not calls:
                return None if final or end >= 0 else Found()
            return Found(calls, end + len("</tool_call>"))
        return None


class Llama(ToolFormat):
    name, openings, marks = "llama", ("<|python_tag|>",), ("<|python_end|>", "<|python_start|>")
    _name, _built_in = re.compile(r"[A-Za-z_][\w.]*"), re.compile(r"[A-Za-z_][\w.]*\.call\(")
    bare = re.compile(r"\{|\[(?=\s*(?:[A-Za-z_][\w.]*(?:\(|\Z)|\Z))")

    def recognise(self, template: str) -> bool:
        return "<|python_tag|>" in template or '"parameters": ' in template or "func_name1(" in template

    def read(self, text: str, final: bool) -> Found | None:
        at = _space(text, len("<|python_tag|>") if text.startswith("<|python_tag|>") else 0)
        if text[at : at + 1] == "[":
            return self._read_python(text[at:], at, final)
        if text[at : at + 1].isidentifier():
            return self._read_built_in(text, at, final)
        calls: list[Call] = []
        end = at
        while True:
            one = _object_call(text, at)
            if one is None:
                return Found(tuple(calls), end) if calls else None if text[at:] or final else Found()
            calls += one[0]
            if one[1] is None:
                return Found(tuple(calls))
            end = one[1]
            at = _space(text, end)
            if text[at : at + 1] in (";", ","):
                at = _space(text, at + 1)
            if not text[at:]:
                return Found(tuple(calls), end if final else None)

    def _read_built_in(self, text: str, at: int, final: bool) -> Found | None:
        begun = self._built_in.match(text, at)
        if begun is None:
            return Found() if not final and self._name.fullmatch(text, at) else None
        for match in re.compile(r"\)").finditer(text, begun.end()):
            try:
                call = _python_call(ast.parse(text[at : match.end()], mode="eval").body)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
            return (
                None if call is None else Found((Call(call.name.removesuffix(".call"), call.arguments),), match.end())
            )
        return None if final else Found()

    def _read_python(self, text: str, offset: int, final: bool) -> Found | None:
        for match in re.finditer(r"\)\s*\]", text):
            try:
                tree = ast.parse(text[: match.end()], mode="eval").body
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
            calls = [_python_call(item) for item in tree.elts] if isinstance(tree, ast.List) else []
            if not calls or None in calls:
                return None
            return Found(tuple(call for call in calls if call), offset + match.end())
        return None if final else Found()


class Mistral(ToolFormat):
    name, openings, marks = "mistral", ("[TOOL_CALLS]",), ("[ARGS]", "[CALL_ID]")
    _named = re.compile(r"([\w.-]+)(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\])?\s*")

    def recognise(self, template: str) -> bool:
        return "[TOOL_CALLS]" in template

    def read(self, text: str, final: bool) -> Found | None:
        at = _space(text, len("[TOOL_CALLS]"))
        calls: list[Call] = []
        if text[at : at + 1] != "[":
            named = self._named.match(text, at)
            if named is None or text[named.end() : named.end() + 1] not in ("{", "", "["):
                return None if text[at:] or final else Found()
            scanned = scan_object(text, named.end())
            if scanned is None:
                return None if final else Found()
            raw = text[named.end() : scanned.end]
            return Found((Call(named.group(1), raw.rstrip() if scanned.end is None else raw),), scanned.end)
        while True:
            at = _space(text, at + 1)
            one = _object_call(text, at)
            if one is None:
                return None if text[at:] or final else Found(tuple(calls))
            calls += one[0]
            if one[1] is None:
                return Found(tuple(calls))
            at = _space(text, one[1])
            if text[at : at + 1] == "]":
                return Found(tuple(calls), at + 1)
            if text[at : at + 1] != ",":
                return Found(tuple(calls), None if not text[at:] and not final else at)


class DeepSeek(ToolFormat):
    name, openings = "deepseek", ("<\uff5ctool\u2581calls\u2581begin\uff5c>",)
    begin, separator, end, last = (
        f"<\uff5ctool\u2581{name}\uff5c>" for name in ("call\u2581begin", "sep", "call\u2581end", "calls\u2581end")
    )
    marks = (begin, separator, end, last)

    def recognise(self, template: str) -> bool:
        return self.openings[0] in template

    def read(self, text: str, final: bool) -> Found | None:
        at = _space(text, len(self.openings[0]))
        calls: list[Call] = []
        while text.startswith(self.begin, at):
            begun = at + len(self.begin)
            place = text.find(self.separator, begun)
            if place < 0:
                return None if final else Found(tuple(calls))
            kind, rest = text[begun:place], place + len(self.separator)
            fenced = re.compile(r"([^\n]*)\n```json\n").match(text, rest) if kind == "function" else None
            if kind == "function" and fenced is None:
                return None if final else Found(tuple(calls))
            name, start = (fenced.group(1), fenced.end()) if fenced is not None else (kind, _space(text, rest))
            scanned = scan_object(text, start)
            if scanned is None:
                return None if text[start:] or final else Found((*calls, Call(name.strip())))
            calls.append(Call(name.strip(), text[start : scanned.end]))
            stop = -1 if scanned.end is None else text.find(self.end, scanned.end)
            if stop < 0:
                return Found(tuple(calls))
            at = _space(text, stop + len(self.end))
        if not calls and text[at:] and not self.begin.startswith(text[at:]):
            return None
        if text.startswith(self.last, at):
            return Found(tuple(calls), at + len(self.last))
        ended = final or not (self.last.startswith(text[at:]) or self.begin.startswith(text[at:]))
        return Found(tuple(calls), at if ended and calls else None)


FORMATS: tuple[ToolFormat, ...] = (DeepSeek(), Mistral(), Hermes(), Llama())
PLAIN = FORMATS[2]  # of models that were told in words


def format_of(tokenizer: PreTrainedTokenizerBase) -> ToolFormat | None:
    """The form that the tokenizer's chat template asks for; None if it is none of these."""
    template = str(tokenizer.get_chat_template()) if tokenizer.chat_template else ""
    return next((one for one in FORMATS if one.recognise(template)), None)


def _space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _past(text: str, at: int, closing: str, final: bool) -> int | None:
    """The place behind `closing`, where it follows; None while it may."""
    place = _space(text, at)
    if text.startswith(closing, place):
        return place + len(closing)
    return None if closing.startswith(text[place:]) and not final else at


def _object_call(text: str, at: int) -> tuple[tuple[Call, ...], int | None] | None:
    """A call that is one object at `at`: the call, once its name is there, and where it ends."""
    scanned = scan_object(text, at)
    if scanned is None:
        return None
    if "name" not in scanned.whole:
        return None if scanned.end is not None else ((), None)
    name = json.loads(scanned.fields["name"]) if is_whole_value(scanned.fields["name"]) else None
    if not isinstance(name, str) or not name:
        return None
    return (Call(name, _arguments(scanned)),), scanned.end


def _arguments(scanned: ScannedObject) -> str:
    for key in ("arguments", "parameters"):
        raw = scanned.fields.get(key, "")
        is_whole = key in scanned.whole or is_whole_value(raw)
        if raw.startswith("{"):
            return raw if is_whole else raw.rstrip()
        if raw and is_whole:
            value = json.loads(raw) if is_whole_value(raw) else raw
            return value if isinstance(value, str) else "{}" if value is None else raw
        if raw:
            return ""
    return "{}" if scanned.end is not None else ""


def _tagged_calls(text: str) -> list[Call]:
    """<function=NAME><parameter=KEY>value</parameter>...</function>"""
    calls = []
    for name, body in re.findall(r"<function=([^>\s]+)>(.*?)(?:</function>|\Z)", text, re.DOTALL):
        found: dict[str, Any] = {}
        for key, value in re.findall(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", body, re.DOTALL):
            found[key] = json.loads(value) if is_whole_value(value) else value
        calls.append(Call(name, json.dumps(found, ensure_ascii=False)))
    return calls


_NAMES: Mapping[str, Any] = {"true": True, "false": False, "null": None}


def _python_call(node: ast.expr) -> Call | None:
    if not isinstance(node, ast.Call) or node.args or any(item.arg is None for item in node.keywords):
        return None
    try:
        found = {str(item.arg): _python_value(item.value) for item in node.keywords}
        return Call(ast.unparse(node.func), json.dumps(found, ensure_ascii=False))
    except (ValueError, TypeError, RecursionError):
        return None


def _python_value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.List):
        return [_python_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {
            ast.literal_eval(key): _python_value(value)
            for key, value in zip(node.keys, node.values, strict=True)
            if key is not None
        }
    return ast.literal_eval(node)
