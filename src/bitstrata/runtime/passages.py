"""Passages: what the next token of a reply is for, read from the reply so far.

    structure  it lies inside of a tool call, in the form of the model's family (tools/formats.py), of a JSON object or
               list that began a line, of a fenced block; or the reply is held to a grammar
    forced     the grammar leaves one text to come, whatever the model says
    opening    one of these may begin with it, or the reply end: the reply's first token, a line's, one behind the end
               of a sentence or of another structure, or after what may be the beginning of a mark
    prose      all else

Text is read a token at a time, each as it is alone: what is lost so, a first space or a part of a character, belongs to
no mark. Kept is no more than the line, or the structure, that is being written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

from transformers import PreTrainedTokenizerBase

from ..models import added_tokens
from .policy import Passage
from .tools import PLAIN, Brackets, ToolFormat, format_of

BACK = 1024  # tokens of a prompt that are looked at for what it leaves open
_FENCE = re.compile(r"^[ \t]*(```|~~~)", re.MULTILINE)
_JSON = re.compile(r"^[ \t]*(?=\{\s*(?:[\"}]|\Z)|\[\s*(?:[\[{\"\]\d-]|\Z))", re.MULTILINE)
_SENTENCE = re.compile(r"[.!?:\u3002\uff01\uff1f\uff1a][)\"'*\]\u201d\u2019]*\s*\Z")

End = Callable[[str], int | None]  # the text of a structure so far -> where it ends; 0 if it is none after all


class PassageReader:
    """Makes the readers of replies by one tokenizer; from any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        own = format_of(tokenizer)
        self._forms = (PLAIN,) if own is None or own is PLAIN else (own, PLAIN)
        marks = {text for form in self._forms for text in (*form.openings, *form.marks)}
        special = {number: token.content for number, token in added_tokens(tokenizer).items() if token.special}
        self._turns = {number for number, text in special.items() if text not in marks}
        self.text_of = lru_cache(maxsize=1 << 16)(lambda token: str(tokenizer.decode([token])))

    def begin(self, prompt: Sequence[int]) -> ReplyReader:
        """The reader of what follows `prompt`, which may leave a structure open: its last turn is read first."""
        turn = 0
        for token in reversed(prompt[-BACK:]):
            if token in self._turns:
                break
            turn += 1
        reader = ReplyReader(self._forms, self.text_of)
        for token in prompt[len(prompt) - turn :]:
            reader.push(token)
        return reader


class ReplyReader:
    """Of one reply, made by PassageReader. passage: of the next token, for a reply that no grammar holds."""

    def __init__(self, forms: Sequence[ToolFormat], text_of: Callable[[int], str]) -> None:
        self._text_of = text_of
        self._openings = {opening: form for form in forms for opening in form.openings}
        self._bare = next((form.bare for form in forms if form.bare is not None), None)
        self._text = ""  # of the structure that is being written; else of the line
        self._end: End | None = None  # of the structure
        self._is_first = True  # nothing but spaces came before the line

    def push(self, token: int) -> None:
        """The next token of the reply."""
        self._text += self._text_of(token)
        while self._text and (self._opened() if self._end is None else self._closed()):
            pass

    @property
    def passage(self) -> Passage:
        if self._end is not None:
            return "structure"
        line = self._text.strip()
        if not line or line in ("`", "``", "~", "~~") or _SENTENCE.search(line):
            return "opening"
        begun = any(line.endswith(one[:length]) for one in self._openings for length in range(1, len(one)))
        return "opening" if begun else "prose"

    def _opened(self) -> bool:
        """Whether a structure begins in the text; all before it, and before the last line, is forgotten."""
        found: list[tuple[int, End]] = [
            (place, partial(_call_end, form, opening))
            for opening, form in self._openings.items()
            if (place := self._text.find(opening)) >= 0
        ]
        if match := _FENCE.search(self._text):
            found.append((match.start(1), partial(_fence_end, match.group(1))))
        if match := _JSON.search(self._text):
            found.append((match.end(), _Json()))
        if self._is_first and self._bare is not None and (match := self._bare.match(self._text.lstrip())):
            found.append((len(self._text) - len(self._text.lstrip()), Brackets().end))
        place, self._end = min(found, key=lambda one: one[0], default=(self._text.rfind("\n") + 1, None))
        self._is_first = self._is_first and not self._text[:place].strip()
        self._text = self._text[place:]
        return self._end is not None

    def _closed(self) -> bool:
        """Whether the structure has ended, or is none."""
        assert self._end is not None
        end = self._end(self._text)
        if end is None:
            return False
        self._text, self._end = self._text[end:], None
        self._is_first = self._is_first and end == 0
        return True


def _call_end(form: ToolFormat, opening: str, text: str) -> int | None:
    found = form.read(text, final=False)
    return len(opening) if found is None else found.end


def _fence_end(mark: str, text: str) -> int | None:
    """A line that begins with the mark; or the mark once more in the first line."""
    match = re.search(rf"(?:\A{mark}[^\n]*?|\n[ \t]*){mark}", text)
    return match.end() if match else None


class _Json:
    """0 for what cannot be JSON by its first characters."""

    def __init__(self) -> None:
        self._brackets = Brackets()

    def __call__(self, text: str) -> int | None:
        return self._brackets.end(text) if _JSON.match(text) else 0
