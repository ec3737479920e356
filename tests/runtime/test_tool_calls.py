"""Calls in every form, read of the whole reply and of any pieces of it."""

from __future__ import annotations

import json

import pytest

from bitstrata.runtime.tools import CallParser
from bitstrata.runtime.tools.formats import FORMATS, DeepSeek

DEEPSEEK, MISTRAL, HERMES, LLAMA = FORMATS
A = '{"city": "Ro\\"}me", "deep": {"x": [1, {}]}}'
D = DeepSeek
CASES = {
    "hermes": (
        HERMES,
        f'Let me see.\n<tool_call>\n{{"name": "f", "arguments": {A}}}\n</tool_call>',
        "Let me see.",
        [("f", A)],
    ),
    "two": (
        HERMES,
        f'<tool_call>\n{{"name": "f", "arguments": {A}}}\n</tool_call>\n'
        '<tool_call>{"name":"g","arguments":{}}</tool_call>\n',
        "",
        [("f", A), ("g", "{}")],
    ),
    "turned around": (HERMES, f'<tool_call>{{"arguments": {A}, "name": "f"}}</tool_call> so', "so", [("f", A)]),
    "no call": (HERMES, "a <tool_call> is <tool_ no more", "a <tool_call> is <tool_ no more", []),
    "tags": (
        HERMES,
        "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n"
        "<parameter=b>\nx y\n</parameter>\n</function>\n</tool_call>",
        "",
        [("f", '{"a": 1, "b": "x y"}')],
    ),
    "llama": (LLAMA, f'{{"name": "f", "parameters": {A}}}', "", [("f", A)]),
    "llama tagged": (
        LLAMA,
        f'<|python_tag|>{{"name": "f", "parameters": {A}}}; {{"name": "g", "parameters": {{}}}}',
        "",
        [("f", A), ("g", "{}")],
    ),
    "llama text": (LLAMA, 'It is {"name": "x"}', 'It is {"name": "x"}', []),
    "llama json": (LLAMA, '{"answer": [1]}', '{"answer": [1]}', []),
    "pythonic": (LLAMA, '[f(a=1, b=["x"], c=True), g()]', "", [("f", '{"a": 1, "b": ["x"], "c": true}'), ("g", "{}")]),
    "a list": (LLAMA, "[f, g]", "[f, g]", []),
    "mistral": (
        MISTRAL,
        f'[TOOL_CALLS][{{"name": "f", "arguments": {A}}}, {{"name": "g", "arguments": {{}}}}]',
        "",
        [("f", A), ("g", "{}")],
    ),
    "llama built in": (
        LLAMA,
        '<|python_tag|>brave_search.call(query="who won (again)?", count=2)',
        "",
        [("brave_search", '{"query": "who won (again)?", "count": 2}')],
    ),
    "llama code": (LLAMA, "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    "mistral with numbers": (
        MISTRAL,
        f'[TOOL_CALLS] [{{"name": "f", "arguments": {A}, "id": "VvvODy9mT"}}]',
        "",
        [("f", A)],
    ),
    "mistral bare": (MISTRAL, f"[TOOL_CALLS]f{A}[TOOL_CALLS]g{{}}", "", [("f", A), ("g", "{}")]),
    "mistral numbered": (
        MISTRAL,
        f"[TOOL_CALLS]f[CALL_ID]VvvODy9mT[ARGS]{A}",
        "",
        [("f", A)],
    ),
    "mistral named": (
        MISTRAL,
        f"Well. [TOOL_CALLS]f[ARGS]{A}[TOOL_CALLS]g[ARGS]{{}}",
        "Well.",
        [("f", A), ("g", "{}")],
    ),
    "deepseek": (
        DEEPSEEK,
        f"{D.openings[0]}{D.begin}f{D.separator}{A}{D.end}{D.begin}g{D.separator}{{}}{D.end}{D.last}",
        "",
        [("f", A), ("g", "{}")],
    ),
    "deepseek fenced twice": (
        DEEPSEEK,
        f"{D.openings[0]}{D.begin}function{D.separator}f\n```json\n{A}\n```{D.end}\n"
        f"{D.begin}function{D.separator}g\n```json\n{{}}\n```{D.end}{D.last}",
        "",
        [("f", A), ("g", "{}")],
    ),
    "deepseek fenced": (
        DEEPSEEK,
        f"Hm. {D.openings[0]}{D.begin}function{D.separator}f\n```json\n{A}\n```{D.end}{D.last}",
        "Hm.",
        [("f", A)],
    ),
}


def read(form, pieces):
    parser, text, calls = CallParser(form), "", {}
    for said, deltas in [*map(parser.push, pieces), parser.flush()]:
        text += said
        for delta in deltas:
            name, arguments = calls.get(delta.index, ("", ""))
            calls[delta.index] = (name + (delta.name or ""), arguments + delta.arguments)
    return text, list(calls.values()), parser


@pytest.mark.parametrize("case", CASES)
def test_calls_are_read_of_any_pieces(case):
    form, reply, text, calls = CASES[case]
    for size in (len(reply), 1, 2, 3, 5, 7, 11):
        pieces = [reply[at : at + size] for at in range(0, len(reply), size)]
        assert read(form, pieces)[:2] == (text, calls), size


@pytest.mark.parametrize("case", CASES)
def test_a_reply_that_is_cut_has_the_beginning_of_its_calls(case):
    form, reply, _, calls = CASES[case]
    for end in range(len(reply)):
        _, found, _ = read(form, list(reply[:end]))
        for (name, arguments), (whole, full) in zip(found, calls, strict=False):
            assert (name, full[: len(arguments)]) == (whole, arguments)
        assert len(found) <= len(calls)


def test_arguments_come_as_they_are_written():
    parser = CallParser(HERMES)
    seen = [delta for piece in CASES["hermes"][1] for delta in parser.push(piece)[1]]
    assert len(seen) > len(A) // 2
    assert json.loads("".join(delta.arguments for delta in seen)) == json.loads(A)
    assert parser.whole == 1
