"""Texts -> token windows.

A text is a UTF-8 file, its documents separated by `<|endoftext|>`, or the name of a built-in one:

    stdlib   the Python standard library's source on this machine, a module a document

Every window starts with the prefix, what the tokenizer puts in front of a text (models/tokens.py): BOS for some,
other tokens for a few, nothing for the others.

Evaluation windows never cross a document: each document is cut into windows of at most `seq_len`
tokens, the prefix included; windows do not overlap. The text's tokens behind the prefix are predicted; without a
prefix the first token of a window is only read, because nothing stands before it. This is `scored` "all". With
"second-half" windows are cut and predicted as llama.cpp's `llama-perplexity` does: documents are joined, each window is
exactly `seq_len` long, and only the tokens behind its middle are predicted, seq_len - 1 - seq_len // 2 of them.

Calibration windows are all exactly `seq_len` long: documents, each behind the prefix, are joined and
cut, and the prefix stands first in every window.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .. import arguments
from ..errors import TextError, UsageError
from ..models import encode_body, text_prefix

SEPARATOR = "<|endoftext|>"
JSON_SAMPLE = 1 << 20  # characters in which JSON is looked for line by line
SCORED = ("all", "second-half")  # tokens of a window that are predicted
LONGEST_PATH = 300  # characters of a name in a message


def read_text(text: str | Path, part: str | None = None) -> list[str]:
    """The documents of `text`, a file or the name of a built-in text.

    Args:
        part: of a built-in text: "calibration" or "heldout", disjoint; None for all of it.

    Raises UsageError for what is no path, TextError if the file is missing, empty, not UTF-8, or JSON with texts in it.
    """
    text = arguments.path(
        "the text", text, hint="write texts into a file, separated by <|endoftext|>, and give its name"
    )
    if text == "stdlib":
        return stdlib_documents(part)
    path, content = Path(text), file_text(text)
    if _is_json(content):
        raise TextError(
            f"{path} holds JSON, not text: keys and quotes would be measured with the words",
            hint=f"write the texts themselves, separated by {SEPARATOR}: jq -j '.text + \"{SEPARATOR}\"'; a file with "
            "this separator in it is always taken as it is",
        )
    documents = [document.strip("\n") for document in content.split(SEPARATOR)]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise TextError(f"{path} is empty", hint="a text needs words to measure on")
    return documents


def file_text(name: str) -> str:
    """The UTF-8 text of a file. Raises TextError if it cannot be read."""
    path, name = Path(name), arguments.shown(name, LONGEST_PATH)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TextError(
            f"there is no text {name}", hint="pass a UTF-8 file, or what is built in: stdlib, chat"
        ) from None
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}",
            hint="convert it, for example: iconv -f latin1 -t utf-8",
        ) from error
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise TextError(f"{name} cannot be read: {reason}", hint="pass a UTF-8 text file") from error


def _is_json(content: str) -> bool:
    """Whether this is a JSON object or list, or one a line, without our separator of documents."""
    start = content.lstrip("\ufeff \t\r\n")
    if SEPARATOR in content or not start.startswith(("{", "[")):
        return False
    lines = [line for line in start[:JSON_SAMPLE].splitlines() if line.strip()]
    whole = lines[:-1] if len(start) > JSON_SAMPLE else lines  # the last may be cut
    return _parses(start) or (bool(whole) and all(map(_parses, whole)))


def _parses(text: str) -> bool:
    try:
        return isinstance(json.loads(text), (dict, list))
    except (ValueError, RecursionError):
        return False


def stdlib_documents(part: str | None = None) -> list[str]:
    """Modules of the running Python's standard library, in the order of their names.

    A module belongs to the "heldout" part if the hash of its name says so (one in five), else to
    "calibration"; the split does not change when modules are added.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.glob("**/*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(("site-packages/", "dist-packages/", "test/", "idlelib/", "lib2to3/tests/")):
            continue
        heldout = hashlib.sha256(name.encode()).digest()[0] % 5 == 0
        if part is not None and heldout != (part == "heldout"):
            continue
        try:
            content = path.read_text(encoding="utf-8").strip("\n")
        except (UnicodeDecodeError, OSError):
            continue  # a few files of the library are deliberately in other encodings
        if content:
            documents.append(content)
    if not documents:
        raise TextError(f"no Python source was found in {root}", hint="pass a text file instead of `stdlib`")
    return documents


def text_digest(documents: Sequence[str]) -> str:
    """sha256 of the documents, for provenance and for resuming safely."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode() + b"\0")
    return digest.hexdigest()


def given_tokens(tokenizer: PreTrainedTokenizerBase, seq_len: int = 0, scored: str = "all") -> int:
    """Tokens at the start of an evaluation window that are read and not predicted."""
    given = max(1, len(text_prefix(tokenizer)))
    return given if scored == "all" else max(given, seq_len // 2 + 1)


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    seq_len: int,
    max_tokens: int | None = None,
    scored: str = "all",
) -> Iterator[list[int]]:
    """Windows of at most `seq_len` tokens that together predict at most `max_tokens` tokens.

    A window predicts all but its first `given_tokens`. Raises UsageError if `seq_len` leaves none to predict.
    """
    given, left = given_tokens(tokenizer, seq_len, scored), max_tokens
    if seq_len <= given:
        least = given + 1 if scored == "all" else max(3, len(text_prefix(tokenizer)) + 1)
        raise UsageError(f"seq_len must be at least {least}, got {seq_len}")
    cut = _within_documents if scored == "all" else _whole
    for window in cut(tokenizer, documents, seq_len):
        if left is not None:
            window = window[: left + given]
        if len(window) <= given:
            continue
        yield window
        if left is not None:
            left -= len(window) - given
            if left <= 0:
                return


def _within_documents(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], seq_len: int
) -> Iterator[list[int]]:
    """Windows that begin with the prefix and never cross a document; its last is as long as it happens to be."""
    prefix = text_prefix(tokenizer)
    step = seq_len - len(prefix)
    for document in documents:
        tokens = encode_body(tokenizer, document)
        for start in range(0, len(tokens), step):
            yield prefix + tokens[start : start + step]


def _whole(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], seq_len: int) -> Iterator[list[int]]:
    """Windows of exactly `seq_len` tokens of all documents, each behind the prefix, which also takes the place of what
    a window begins with."""
    prefix = text_prefix(tokenizer)
    stream = _stream(tokenizer, documents)
    for start in range(0, len(stream) - seq_len + 1, seq_len):
        yield prefix + stream[start + len(prefix) : start + seq_len]


def _stream(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> list[int]:
    """The tokens of all documents, each behind the prefix."""
    prefix = text_prefix(tokenizer)
    return [token for document in documents for token in (*prefix, *encode_body(tokenizer, document))]


@dataclass(frozen=True)
class Windows:
    """Token windows for quantization: int64 [n, seq_len] each, taken from different places of one text."""

    calibration: Tensor
    heldout: Tensor

    def digest(self) -> str:
        """sha256 of all tokens: another tokenizer gives another digest."""
        digest = hashlib.sha256(self.calibration.numpy().tobytes())
        digest.update(self.heldout.numpy().tobytes())
        return digest.hexdigest()


def cut_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    num_samples: int,
    seq_len: int,
    num_heldout: int,
    seed: int,
    name: str = "the calibration text",
) -> Windows:
    """Up to `num_samples` windows to calibrate on and up to `num_heldout` to check on, chosen by `seed`.

    A text too short for both gives an eighth of its windows (at least one) to the check. Raises
    TextError if it does not hold two windows.
    """
    prefix = text_prefix(tokenizer)
    step = seq_len - len(prefix)
    if seq_len < 2 or step < 1:
        raise UsageError(f"seq_len must be at least {max(2, 1 + len(prefix))}, got {seq_len}")
    stream = _stream(tokenizer, documents)
    count = len(stream) // step
    if count < 2:
        raise TextError(
            f"{name} has {len(stream)} tokens; two windows of {seq_len} are the least",
            hint="give a longer text or a smaller --seq-len",
        )
    windows = torch.tensor(stream[: count * step]).view(count, step)
    windows = torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(count, len(prefix)), windows], dim=1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    heldout = min(num_heldout, max(1, count // 8))
    return Windows(windows[order[heldout : heldout + num_samples]], windows[order[:heldout]])
