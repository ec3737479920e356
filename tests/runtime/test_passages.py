"""Where a reply stands: which parts of it are calls, JSON and code, where these may begin, and what is prose."""

from __future__ import annotations

import copy
import random

import pytest
from transformers import AddedToken

from bitstrata.runtime.passages import BACK, PassageReader, ReplyReader
from bitstrata.runtime.tools.formats import FORMATS

DEEPSEEK, MISTRAL, HERMES, LLAMA = FORMATS
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "}</tool_call>"}}\n</tool_call>'
DEEPSEEK_CALL = f'{DEEPSEEK.openings[0]}{DEEPSEEK.begin}f{DEEPSEEK.separator}{{"a": 1}}{DEEPSEEK.end}{DEEPSEEK.last}'


def reader_of(*forms) -> ReplyReader:
    return ReplyReader(forms or (HERMES,), chr)


def passages(text: str, *forms) -> list[str]:
    """Of each character, as known before it came."""
    reader, found = reader_of(*forms), []
    for character in text:
        found.append(reader.passage)
        reader.push(ord(character))
    return found


def parts(text: str, passage: str, *forms) -> list[str]:
    """The longest stretches of `text` whose characters are `passage`."""
    found, before = [], ""
    for character, now in zip(text, passages(text, *forms), strict=True):
        if now == passage:
            if before != passage:
                found.append("")
            found[-1] += character
        before = now
    return found


@pytest.mark.parametrize(
    ("text", "forms", "inside"),
    [
        (f"Let me look.\n{CALL}\nDone", (HERMES,), [CALL.removeprefix("<tool_call>")]),
        (f"I ask {CALL} and say", (HERMES,), [CALL.removeprefix("<tool_call>")]),
        ('Well, [TOOL_CALLS][{"name": "f", "arguments": {}}] so', (MISTRAL,), ['[{"name": "f", "arguments": {}}]']),
        (DEEPSEEK_CALL, (DEEPSEEK, HERMES), [DEEPSEEK_CALL.removeprefix(DEEPSEEK.openings[0])]),
        ('{"name": "f", "parameters": {"a": [1]}} yes', (LLAMA, HERMES), ['"name": "f", "parameters": {"a": [1]}}']),
        ('[f(a="x]", b=[1])] yes', (LLAMA, HERMES), ['f(a="x]", b=[1])]']),
        ('Here:\n{"a": {"b": "}\\"}"}, "c": []}\nThat is all', (HERMES,), ['"a": {"b": "}\\"}"}, "c": []}']),
        ('[{"a": 1}, 2] and more', (HERMES,), ['{"a": 1}, 2]']),
        ("So:\n  ```json\n[1]\n  ```\nfine", (HERMES,), ["json\n[1]\n  ```"]),
        ("~~~\na ``` b\n~~~\nfine", (HERMES,), ["\na ``` b\n~~~"]),
        ("```a = 1``` is code\nand this is not", (HERMES,), ["a = 1```"]),
    ],
    ids=[
        *("hermes", "hermes in a line", "mistral", "deepseek", "llama", "llama python", "json", "list", "fence"),
        *("tildes", "one line"),
    ],
)
def test_what_lies_inside_of_structures(text, forms, inside):
    assert parts(text, "structure", *forms) == inside


@pytest.mark.parametrize(
    "text",
    [
        "The set {a, b} and the list [1, 2] are in a line",
        "a < b, x <tool, `code` and ``more``",
        "Sure, I can call <tool_call> no",
        "I use [brackets] and (others)",
    ],
    ids=["brackets", "marks that are none", "no call", "words"],
)
def test_words_are_no_structures(text):
    inside = "".join(parts(text, "structure"))
    assert inside in ("", " ", " n"), "of what begins like a call no more than shows that it is none"
    assert passages(text + "x")[-1] == "prose"


def test_brackets_that_begin_a_line_and_are_no_json_are_prose_again():
    assert parts("{name} is", "structure") == ["n"]
    assert parts("[see below] is", "structure") == ["s"]
    assert passages("{name} is")[-1] == "prose"


def test_a_structure_may_open_at_the_beginning_of_lines_and_sentences_and_behind_another():
    text = f"So it is. We go on (really?) now\n\n  and on: well\n{CALL}{CALL} end"
    places = passages(text)
    for before in (
        "So it is.",
        "So it is. ",
        "We go on (really?",
        "now\n",
        "now\n\n",
        "and on:",
        "well\n",
        CALL,
        CALL * 2,
    ):
        at = text.index(before) + len(before)
        assert places[at] == "opening", before
    for before in ("So it", "We go", "\n\n  and", "end"[:1]):
        at = text.rindex(before) + len(before)
        assert places[at] == "prose", before


def test_what_may_become_a_mark_is_an_opening():
    for text, forms in [
        ("I say <tool_", (HERMES,)),
        ("say `", (HERMES,)),
        ("so [TOOL", (MISTRAL,)),
        ("x\n``", (HERMES,)),
    ]:
        expected = "prose" if text == "say `" else "opening"
        assert passages(text + "?", *forms)[-1] == expected, text


@pytest.mark.parametrize("seed", range(20))
def test_how_a_text_is_cut_into_tokens_does_not_matter(seed):
    chance = random.Random(seed)
    pieces = [
        "So it is.",
        "\n",
        " ",
        CALL,
        '{"a": [1, {"b": "}"}]}',
        "```json\n[1]\n```",
        "{no}",
        "<tool",
        "word",
        "[TOOL_CALLS]f[ARGS]{}",
    ]
    text = "".join(chance.choices(pieces, k=12))
    alone = [*passages(text, MISTRAL, HERMES), None]
    texts, at = [], 0
    while at < len(text):
        texts.append(text[at : at + chance.randint(1, 9)])
        at += len(texts[-1])
    reader = ReplyReader((MISTRAL, HERMES), texts.__getitem__)
    at = 0
    for number, piece in enumerate(texts[:-1]):
        reader.push(number)
        at += len(piece)
        assert reader.passage == alone[at], (text[:at], text[at:])


# by tokens


@pytest.fixture(scope="module")
def chatting(tokenizer):
    """With turns that begin with a special token, and calls that do."""
    other = copy.deepcopy(tokenizer)
    names = ["<|turn|>", "<tool_call>", "</tool_call>"]
    other.add_special_tokens({"additional_special_tokens": [AddedToken(name, special=True) for name in names]})
    return other


def test_marks_that_are_special_tokens_are_seen(chatting):
    reader = PassageReader(chatting).begin(chatting.encode("<|turn|>assistant\n", add_special_tokens=False))
    assert reader.passage == "opening"
    reader.push(chatting.convert_tokens_to_ids("<tool_call>"))
    assert reader.passage == "structure"
    for token in chatting.encode('{"name": "f", "arguments": {}}', add_special_tokens=False):
        reader.push(token)
        assert reader.passage == "structure"
    reader.push(chatting.convert_tokens_to_ids("</tool_call>"))
    assert reader.passage == "opening"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<|turn|>user\n```json\n[1<|turn|>assistant\n", "opening"),
        ("<|turn|>user\nwrite<|turn|>assistant\n```json\n[1", "structure"),
        ("<|turn|>user\nwrite<|turn|>assistant\nIt is", "prose"),
        ('<|turn|>assistant\n<tool_call>{"name"', "structure"),
        ("some text\n```python\nx =", "structure"),
        ("", "opening"),
    ],
    ids=["another turn", "begun json", "begun prose", "begun call", "a text", "nothing"],
)
def test_a_prompt_says_where_the_reply_begins(chatting, prompt, expected):
    ids = chatting.encode(prompt, add_special_tokens=False)
    assert PassageReader(chatting).begin(ids).passage == expected


def test_of_a_long_prompt_the_end_is_read(chatting):
    ids = chatting.encode("word " * 50, add_special_tokens=False)
    ids = (ids * (3 * BACK // len(ids)))[: 2 * BACK]
    reader = PassageReader(chatting)
    read = []
    text_of = reader.text_of
    reader.text_of = lambda token: read.append(token) or text_of(token)
    reader.begin(ids)
    assert len(read) == BACK
