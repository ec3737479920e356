"""What a text argument may be: a text, chats, or several of them, each with its share of the windows.

    text.txt            a UTF-8 file
    stdlib              a built-in text (data.py)
    chat                built-in chats, in the model's own template (made_chats.py)
    chats.jsonl         chats of one's own (chats.py), or {"text": ...} a line
    texts.csv           a table whose column `text`, or only column, has a text a row (csv_texts.py)
    text.txt,chat:0.3   both: three windows of ten are of chats, the others of the text

A list of texts, or of chats, is what a Python caller may give instead of a file's name.

A share is above 0 and below 1; sources without one share what is left evenly.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .. import arguments
from ..errors import TextError, UsageError
from .chats import Chat, chats_of, json_lines, written_chats
from .csv_texts import column_of_texts
from .data import SEPARATOR, Windows, cut_windows, file_text, read_text
from .data import text_digest as documents_digest
from .made_chats import made_chats

BUILT_IN = ("stdlib", "chat")
SHARES = "give shares that leave something for each source: text.txt,chat:0.3"


@dataclass(frozen=True)
class Source:
    """One text or file of chats, and its share of the windows."""

    name: str
    share: float
    documents: tuple[str, ...] = ()
    chats: tuple[Chat, ...] = ()

    def written(self, tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
        """Its documents; chats in the template of `tokenizer`. Raises TextError as `usable_chats`."""
        return list(written_chats(tokenizer, self.chats)) if self.chats else self.documents


@dataclass(frozen=True)
class Mix:
    """Sources whose shares add up to 1."""

    sources: tuple[Source, ...]

    def digest(self) -> str:
        digest = hashlib.sha256()
        for source in self.sources:
            chats = [json.dumps([chat.messages, chat.tools], sort_keys=True) for chat in source.chats]
            digest.update(f"{source.share!r} {documents_digest([*source.documents, *chats])}\0".encode())
        return digest.hexdigest()


Text = Sequence[str] | Mix  # documents of one text, or what needs a tokenizer or has shares


def read_mix(text: str | Path | Sequence[Any], part: str | None = None) -> Text:
    """What `text` names: the documents of one plain text, or a Mix. A list of texts or chats is itself.

    Args:
        part: of what is built in: "calibration" or "heldout", disjoint; None for all of it.

    Raises UsageError for shares that cannot be used, TextError for a text or a line that cannot be read.
    """
    if isinstance(text, (list, tuple)):
        return _listed(text)
    name = arguments.path(
        "the text", text, hint="write texts into a file, separated by <|endoftext|>, and give its name"
    )
    shares = _shares(name)
    sources = tuple(_source(source, share, part) for source, share in shares.items())
    if len(sources) == 1 and not sources[0].chats:
        return list(sources[0].documents)
    return Mix(sources)


def _listed(items: Sequence[Any]) -> Text:
    if all(isinstance(item, str) for item in items):
        documents = [item.strip("\n") for item in items if item.strip()]
        if not documents:
            raise TextError("the list of texts is empty", hint="a text needs words to measure on")
        return documents
    if any(isinstance(item, str) for item in items):
        raise TextError("the list holds texts and chats", hint="give one kind: texts, or a list of messages each")
    chats = [{"messages": list(item)} if isinstance(item, (list, tuple)) else item for item in items]
    for place, chat in enumerate(chats, 1):
        if not isinstance(chat, Mapping):
            raise TextError(f"entry {place} of the list is a {type(chat).__name__}, not a text or a chat")
    return Mix((Source("chats", 1.0, chats=tuple(chats_of(list(enumerate(chats, 1)), "the list's entry"))),))


def text_name(text: str | Path | Sequence[Any]) -> str:
    """How a report names it: without folders."""
    if isinstance(text, (list, tuple)):
        return f"{len(text)} texts" if all(isinstance(item, str) for item in text) else f"{len(text)} chats"
    shares = _shares(os.fspath(text))  # type: ignore[arg-type]
    if len(shares) == 1:
        return Path(next(iter(shares))).name
    return ",".join(f"{Path(name).name}:{share:.4g}" for name, share in shares.items())


def documents_of(text: Text, tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
    """The documents of one source, chats in the template of `tokenizer`. Raises UsageError for several sources."""
    if not isinstance(text, Mix):
        return text
    if len(text.sources) > 1:
        raise UsageError("this measures one text, not a mix of several", hint="measure them one after the other")
    return text.sources[0].written(tokenizer)


def text_digest(text: Text) -> str:
    """sha256 of the documents, messages and shares, for provenance and for resuming safely."""
    return text.digest() if isinstance(text, Mix) else documents_digest(text)


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    *,
    num_samples: int,
    seq_len: int,
    num_heldout: int,
    seed: int,
) -> Windows:
    """Up to `num_samples` windows to calibrate on and up to `num_heldout` to check on, chosen by `seed`.

    Those of a mix are of its sources by their shares, shuffled together. Raises TextError as `cut_windows` does, with
    the name of the source, and as `usable_chats`.
    """
    if not isinstance(text, Mix):
        return cut_windows(
            tokenizer, text, num_samples=num_samples, seq_len=seq_len, num_heldout=num_heldout, seed=seed
        )
    shares = [source.share for source in text.sources]
    counts = zip(_apportioned(num_samples, shares), _apportioned(num_heldout, shares), strict=True)
    cut = [
        cut_windows(
            tokenizer,
            source.written(tokenizer),
            num_samples=samples,
            seq_len=seq_len,
            num_heldout=heldout,
            seed=seed,
            name=source.name,
        )
        for source, (samples, heldout) in zip(text.sources, counts, strict=True)
    ]
    mixed = []
    for windows in ([one.calibration for one in cut], [one.heldout for one in cut]):
        together = torch.cat(windows)
        mixed.append(together[torch.randperm(len(together), generator=torch.Generator().manual_seed(seed))])
    return Windows(*mixed)


def _apportioned(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that add up to `total`, by largest remainder; the first of equal ones comes first."""
    exact = [total * share for share in shares]
    counts = [int(value) for value in exact]
    order = sorted(range(len(shares)), key=lambda place: counts[place] - exact[place])
    for place in order[: total - sum(counts)]:
        counts[place] += 1
    return counts


def _source(name: str, share: float, part: str | None) -> Source:
    if name == "chat":
        return Source(name, share, chats=tuple(made_chats(part)))
    path = Path(name)
    if path.suffix == ".csv":
        return Source(name, share, documents=tuple(column_of_texts(path, file_text(name))))
    if path.suffix != ".jsonl":
        return Source(name, share, documents=tuple(read_text(name, part)))
    content = file_text(name).removeprefix("\ufeff")
    if SEPARATOR in content or not content.lstrip().startswith("{"):  # a text, or nothing that read_text takes
        return Source(name, share, documents=tuple(read_text(name, part)))
    lines = json_lines(path, content)
    if "messages" in lines[0][1]:
        return Source(name, share, chats=tuple(chats_of(lines, f"{path} line")))
    for number, value in lines:
        if not isinstance(value.get("text"), str):
            raise TextError(
                f"{path} line {number} has neither messages nor a text",
                hint='one object a line: {"messages": [...]} or {"text": "..."}',
            )
    documents = [value["text"].strip("\n") for _, value in lines]
    return Source(name, share, documents=tuple(document for document in documents if document.strip()))


def _shares(text: str) -> dict[str, float]:
    """Name -> share of each source in `text`, in their order. A file of this very name is that file."""
    if text in BUILT_IN or ("," not in text and ":" not in text) or _exists(text):
        return {text: 1.0}
    given: dict[str, float | None] = {}
    for item in text.split(","):
        name, share = _named_share(item.strip())
        if not name:
            raise UsageError(f"{text!r} names an empty source", hint=SHARES)
        if name in given:
            raise UsageError(f"{name} is given twice", hint=SHARES)
        given[name] = share
    known = [share for share in given.values() if share is not None]
    open_names = [name for name, share in given.items() if share is None]
    left = 1 - sum(known)
    if len(given) == 1 and known:
        raise UsageError(f"{text!r} is one source, which needs no share", hint=f"write {next(iter(given))}")
    if left < -1e-9 or (open_names and left < 1e-9):
        raise UsageError(f"the shares of {text!r} add up to {sum(known):g}, which leaves nothing", hint=SHARES)
    if not open_names and left > 1e-9:
        raise UsageError(f"the shares of {text!r} add up to {sum(known):g}, not to 1", hint=SHARES)
    return {name: left / len(open_names) if share is None else share for name, share in given.items()}


def _named_share(item: str) -> tuple[str, float | None]:
    name, colon, number = item.rpartition(":")
    if not colon or _exists(item):
        return item, None
    try:
        share = float(number)
    except ValueError:
        raise UsageError(f"the share of {name} must be a number, got {number!r}", hint=SHARES) from None
    if not 0 < share < 1:
        raise UsageError(f"the share of {name} must be above 0 and below 1, got {number}", hint=SHARES)
    return name, share


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long, or with a zero byte: read_text says so
        return False
