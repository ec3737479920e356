"""Texts and chats by their shares, chats in a model's own template, and all that a file of chats can have wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_templates import PLAIN, STRICT, TOOLS, chat_tokenizer
from tiny_models import tiny_text, tiny_tokenizer

from bitstrata.calibration import (
    Mix,
    calibration_windows,
    documents_of,
    read_mix,
    read_text,
    text_digest,
    text_name,
    usable_chats,
)
from bitstrata.calibration.chats import Chat, written_chats
from bitstrata.calibration.made_chats import decision_chats, made_chats
from bitstrata.calibration.mix import _apportioned
from bitstrata.errors import TextError, UsageError
from bitstrata.progress import notes, own_notes

CALL = {"function": {"name": "look", "arguments": '{"at": "it"}'}}
SPOKEN = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b!"}]
CALLED = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
SCHEMA = {"type": "function", "function": {"name": "look", "parameters": {}}}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return tiny_text(tmp_path / "text.txt", documents=6, words=150)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"{'q' * (1 + n % 6)}?"}, *SPOKEN[1:]]} for n in range(60)]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def test_one_text_is_what_it_was(text: Path) -> None:
    """The digest that a job keeps of its text, too."""
    assert read_mix(text) == read_mix(str(text)) == read_text(text)
    assert text_digest(read_mix(text)) == text_digest(read_text(text))
    assert text_name(text) == "text.txt"


def test_windows_are_of_each_source_by_its_share(text: Path, chats: Path) -> None:
    tokenizer, mix = chat_tokenizer(PLAIN), read_mix(f"{text},{chats}:0.25")
    assert isinstance(mix, Mix)
    assert [source.share for source in mix.sources] == [0.75, 0.25]

    def cut(seed: int) -> tuple[list[list[int]], list[list[int]]]:
        found = calibration_windows(tokenizer, mix, num_samples=12, seq_len=16, num_heldout=4, seed=seed)
        return found.calibration.tolist(), found.heldout.tolist()

    calibration, heldout = cut(0)
    mark = tokenizer.convert_tokens_to_ids("=")  # between roles; never in the text
    assert [sum(mark in window for window in part) for part in (calibration, heldout)] == [3, 1]
    assert (len(calibration), len(heldout)) == (12, 4)
    assert all(window[0] == 0 for window in [*calibration, *heldout]), "BOS begins every window"
    assert not [window for window in [*calibration, *heldout] if window[1] == 0], "once: the template writes it too"
    assert cut(0) == (calibration, heldout)
    assert cut(1) != (calibration, heldout)
    assert not all(mark in window for window in calibration[-3:]), "sources are shuffled together"


def test_sources_without_a_share_share_what_is_left(text: Path, chats: Path, tmp_path: Path) -> None:
    other = tiny_text(tmp_path / "other.txt", seed=1)
    mix = read_mix(f"{text}, {chats}:0.5 ,{other}")
    assert isinstance(mix, Mix)
    assert [source.share for source in mix.sources] == [0.25, 0.5, 0.25]
    assert text_name(f"{text},{chats}:0.5") == "text.txt:0.5,chats.jsonl:0.5"
    assert _apportioned(10, [0.25, 0.5, 0.25]) == [3, 5, 2]
    assert _apportioned(1, [0.2, 0.3, 0.5]) == [0, 0, 1]


def test_the_digest_covers_texts_messages_and_shares(text: Path, chats: Path) -> None:
    digests = {text_digest(read_mix(f"{text},{chats}:{share}")) for share in (0.25, 0.5)}
    digests |= {text_digest(read_mix(one)) for one in (text, chats)}
    chats.write_text(chats.read_text().replace("b!", "c!", 1))
    digests |= {text_digest(read_mix(f"{text},{chats}:0.25")), text_digest(read_mix(chats))}
    text.write_text(text.read_text() + "more")
    digests.add(text_digest(read_mix(f"{text},{chats}:0.25")))
    assert len(digests) == 7


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("TEXT,CHATS:0", "above 0 and below 1, got 0"),
        ("TEXT,CHATS:1", "above 0 and below 1, got 1"),
        ("TEXT,CHATS:-0.5", "above 0 and below 1"),
        ("TEXT,CHATS:nan", "above 0 and below 1"),
        ("TEXT,CHATS:half", "must be a number, got 'half'"),
        ("TEXT:0.5,CHATS:0.4", "add up to 0.9, not to 1"),
        ("TEXT:0.7,CHATS:0.4", "add up to 1.1, which leaves nothing"),
        ("TEXT:0.7,CHATS:0.3,stdlib", "add up to 1, which leaves nothing"),
        ("TEXT,TEXT:0.5", "is given twice"),
        ("TEXT,,CHATS", "names an empty source"),
        ("chat:0.5", "is one source, which needs no share"),
    ],
)
def test_shares_that_cannot_be_used(given: str, said: str, text: Path, chats: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read_mix(given.replace("TEXT", str(text)).replace("CHATS", str(chats)))
    assert said in caught.value.message
    assert caught.value.hint


def test_a_file_whose_name_has_commas_and_colons_is_that_file(tmp_path: Path) -> None:
    path = tmp_path / "a,b:0.3"
    path.write_text("words")
    assert read_mix(path) == ["words"]
    with pytest.raises(TextError, match="there is no text"):
        read_mix(f"{tmp_path / 'nowhere'},{path.parent / 'no'}:0.5")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is a list, not an object"),
        ('{"text": "words"}', "line 2 has no list of messages"),
        ('{"messages": []}', "line 2 has no list of messages"),
        ('{"messages": ["hello"]}', "line 2 has a message without a role"),
        ('{"messages": [{"role": "user"}]}', "line 2 has a message without content"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', "line 2: the content of a message is a list"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": "look"}', "line 2: tools must be a list"),
        ('{"messages": [{"role": "assistant", "tool_calls": [{}]}]}', "line 2 has a tool call without a function"),
        (
            '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}',
            "line 2: the arguments of f are not JSON",
        ),
    ],
)
def test_a_malformed_line_is_named(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": SPOKEN}) + "\n" + line + "\n")
    with pytest.raises(TextError) as caught:
        read_mix(path)
    assert said in caught.value.message
    assert "chats.jsonl" in caught.value.message


def test_lines_of_texts_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one"}\n{"text": " ", "id": 2}\n\n{"text": "three\\n"}\n')
    assert read_mix(path) == ["one", "three"]
    path.write_text('{"text": "one"}\n{"content": "two"}\n')
    with pytest.raises(TextError, match="line 2 has neither messages nor a text"):
        read_mix(path)
    path.write_text('\ufeff{"text": "one"}\r\n{"text": "two"}\r\n')
    assert read_mix(path) == ["one", "two"]
    path.write_text(json.dumps({"text": "one"}, indent=2))
    with pytest.raises(TextError, match="line 1 is not JSON"):
        read_mix(path)
    path.write_text("\n")
    with pytest.raises(TextError, match="is empty"):
        read_mix(path)
    path.write_text("{}<|endoftext|>words")
    assert read_mix(path) == ["{}", "words"], "with our separator it is a text, whatever its name"


def test_a_column_of_a_table_is_documents(tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    long = "w" * 200_000
    path.write_bytes(f'\ufeffid,text\r\n1,"one, ""1""\nnext"\r\n2,  \r\n3\r\n4,{long}\r\n'.encode())
    assert read_mix(path) == ['one, "1"\nnext', long]
    path.write_text("anything\none\ntwo\n")
    assert read_mix(path) == ["one", "two"]
    assert isinstance(read_mix(f"{path}:0.5,stdlib"), Mix)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("id,body\n1,one\n", "has no column 'text'; its columns are id, body"),
        ("\n", "has no column 'text'; its columns are none"),
        ("id,text\n1,\n", "has no text under its column 'text'"),
        ('id,text\n1,"one\n', "is not CSV: unexpected end of data"),
    ],
    ids=["column", "empty", "texts", "quote"],
)
def test_a_table_without_texts_is_refused(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    path.write_text(content)
    with pytest.raises(TextError) as caught:
        read_mix(path)
    assert f"{path} {said}" in caught.value.message


def test_a_chat_is_written_by_the_template_behind_what_begins_a_text(chats: Path) -> None:
    mix = read_mix(chats)
    assert documents_of(mix, chat_tokenizer(PLAIN))[1] == "=user=qq?</s>=assistant=b!</s>"
    assert documents_of(mix, chat_tokenizer(PLAIN, prefix=""))[1].startswith("<s>=user="), "the template's own"
    with pytest.raises(UsageError, match="not a mix of several"):
        documents_of(read_mix(f"stdlib,{chats}:0.5"), chat_tokenizer(PLAIN))


def test_without_a_template_chats_are_refused(chats: Path) -> None:
    with pytest.raises(TextError, match="need a chat template") as caught:
        documents_of(read_mix(chats), tiny_tokenizer())
    assert "chat_template.jinja" in (caught.value.hint or "")


@own_notes()
def test_what_a_template_cannot_write_is_left_out_with_a_note(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    system = [{"role": "system", "content": "be"}, *SPOKEN]
    rows = [{"messages": CALLED, "tools": [SCHEMA]}, {"messages": SPOKEN}, {"messages": system}]
    path.write_text("\n".join(map(json.dumps, rows)))
    mix = read_mix(path)
    assert isinstance(mix, Mix)
    chats = mix.sources[0].chats
    first = next(written_chats(chat_tokenizer(TOOLS), chats))
    assert first == '#look=user=a?</s>=assistant=-<look{"at": "it"}></s>'
    assert notes() == ()
    assert [len(chat.messages) for chat in usable_chats(chat_tokenizer(STRICT), chats)] == [2]
    assert notes() == (
        "the chat template knows no tools: 1 of 3 chats are left out",
        "1 of 3 chats are left out: the chat template refuses the messages: no system here",
    )
    with pytest.raises(TextError, match="no system here"):
        usable_chats(chat_tokenizer(STRICT), chats[2:])
    with pytest.raises(TextError, match="no chat is left without tools"):
        usable_chats(chat_tokenizer(PLAIN), chats[:1])


def test_the_built_in_chats_are_the_same_at_every_run_and_their_parts_disjoint() -> None:
    def said(chat: Chat) -> set[str]:
        return {str(message["content"]) for message in chat.messages if message["role"] == "user"}

    parts = {part: decision_chats(part) for part in ("calibration", "heldout")}
    assert parts["heldout"] == decision_chats("heldout")
    asked = {part: set().union(*map(said, found)) for part, found in parts.items()}
    assert not asked["calibration"] & asked["heldout"]
    assert min(map(len, asked.values())) > 80, "they are not all the same few"


def test_all_kinds_of_built_in_chats_can_be_written() -> None:
    chats = made_chats("heldout")
    tools = [chat for chat in chats if chat.has_tools]
    assert len(chats) > 4 * len(tools) > 0
    assert len(usable_chats(chat_tokenizer(TOOLS), chats)) == len(chats)
    assert len(usable_chats(chat_tokenizer(PLAIN), chats)) == len(chats) - len(tools)
    assert all(message["role"] in ("user", "assistant", "tool") for chat in chats for message in chat.messages)
