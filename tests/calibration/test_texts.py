"""Reading texts: documents, the built-in text, and everything a text file can have wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitstrata.calibration import read_text, text_digest
from bitstrata.calibration.data import stdlib_documents
from bitstrata.errors import TextError


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_documents_are_split_at_the_separator(tmp_path: Path) -> None:
    text = written(tmp_path / "text", "one\n<|endoftext|>\n  two ü\n\n<|endoftext|>\n \n<|endoftext|>three".encode())
    assert read_text(text) == ["one", "  two ü", "three"]
    assert read_text(str(text)) == read_text(text)
    assert read_text(text, part="calibration") == read_text(text), "parts are for built-in texts"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n\t\r\n ", "is empty"),
        (b"<|endoftext|>\n<|endoftext|>", "is empty"),
        ("caf\u00e9".encode("latin1"), "is not UTF-8: byte 3 is 0xe9"),
        ("words".encode("utf-16"), "is not UTF-8: byte 0 is 0xff"),
        (b"\x80PNG", "is not UTF-8: byte 0 is 0x80"),
    ],
)
def test_an_unusable_text_is_named_and_explained(content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(TextError) as caught:
        read_text(written(tmp_path / "some.txt", content))
    assert said in caught.value.message
    assert "some.txt" in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 3


def test_a_missing_text_or_a_folder_is_named(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "nowhere.txt", "there is no text"), (tmp_path, "cannot be read")):
        with pytest.raises(TextError, match=said) as caught:
            read_text(path)
        assert str(path) in caught.value.message
        assert caught.value.hint


def test_a_file_called_stdlib_is_reached_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "stdlib", b"mine")
    assert read_text("./stdlib") == ["mine"]
    assert len(read_text("stdlib")) > 100


def test_the_parts_of_the_standard_library_are_disjoint_and_together_all_of_it() -> None:
    parts = {part: set(stdlib_documents(part)) for part in ("calibration", "heldout")}
    everything = set(stdlib_documents())
    assert parts["calibration"] | parts["heldout"] == everything
    # empty __init__ files are left out, but two modules may still hold the same text
    assert len(parts["calibration"] & parts["heldout"]) <= 2
    assert 0.1 < len(parts["heldout"]) / len(everything) < 0.3
    assert stdlib_documents("heldout") == stdlib_documents("heldout")


def test_the_digest_depends_on_every_document_and_on_where_they_are_cut() -> None:
    assert text_digest(["ab", "c"]) == text_digest(["ab", "c"])
    assert len({text_digest(x) for x in (["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], ["ab", "c", ""])}) == 5
