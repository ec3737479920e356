"""Texts -> tokens, aside of the event loop, and tokens -> text, as they come.

What is sent cannot be taken back, so two things are held back until they are sure: the bytes of a character that is not
whole yet, and an end of the text that may become a stop text. The pieces together are the decoded tokens, up to the
stop text. (Bytes that never become UTF-8 are replacement characters; how many is up to the tokenizer.)

`tokenizers.decoders.DecodeStream` gives the same text of whole characters, but nothing of a reply that ends within one
(max_tokens), an error for bytes that are no UTF-8, and nothing at all for tokenizers that are not of that library.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from ..models import Infilling, Stops, encode_prompt, encode_turns, text_length, text_prefix
from ..models.compat import byte_level_characters
from .errors import ApiError

LONG = 2000  # characters from which on a text is long
LONG_AT_ONCE = 2
JOINED = 4  # a letter and its marks, the most that Unicode composes into one
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 8  # tokens before the new ones that are decoded with them: some decoders drop the first token's space
WINDOW = 32  # tokens decoded at once
PENDING = 3  # a character of four bytes lacks at most three tokens
_BYTE_LEVEL = byte_level_characters()
T = TypeVar("T")


class PromptEncoder:
    """The tokenizer's work on prompts of up to `room` tokens: in other threads, and none on what cannot fit.

    Tokenizing takes about a hundred times the text's own memory, and seconds where it is megabytes. So a text is
    refused unread if it is longer than `room` of the longest tokens, and of long ones only LONG_AT_ONCE are tokenized
    at a time. No text that would have fitted is refused unless its tokenizer drops much of it: runs of spaces, say.
    Where texts are normalised first, which may join up to JOINED characters in one, JOINED count as one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, room: int) -> None:
        self._tokenizer, self._room = tokenizer, room
        self._token = max(map(len, tokenizer.get_vocab()), default=1)  # characters; of byte-level ones at least as many
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or backend.normalizer is not None:
            self._token *= JOINED
        self.most = room * self._token  # characters
        self._long = ThreadPoolExecutor(LONG_AT_ONCE, thread_name_prefix="bitstrata-tokenizer")

    async def completion(
        self, prompts: Sequence[str] | Sequence[list[int]], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """The tokens of each prompt of /v1/completions, as `bitstrata generate` makes them; tokens stay as they are.

        Control tokens that a prompt spells are control tokens. add_special_tokens: as in `encode_prompt`.

        Raises:
            ApiError: 400 for a text that cannot fit.
            InputError: a prompt without tokens.
        """
        lengths = [len(prompt) for prompt in prompts if isinstance(prompt, str)]
        for length in lengths:
            self.check(length, "prompt")

        def encode(prompt: str | list[int]) -> list[int]:
            if not isinstance(prompt, str):
                return prompt
            return encode_prompt(self._tokenizer, prompt, add_special_tokens=add_special_tokens)

        if not lengths:
            return list(map(encode, prompts))
        return await self._run(sum(lengths), lambda: list(map(encode, prompts)))

    async def infilling(
        self, prompts: Sequence[str] | Sequence[list[int]], suffix: str, *, add_special_tokens: bool = True
    ) -> tuple[list[list[int]], Sequence[int]]:
        """The tokens after which a text comes that goes between each prompt and `suffix`, and tokens that end it.

        Raises ApiError 400 for a text that cannot fit, and for a model that cannot do that.
        """
        lengths = [len(prompt) for prompt in prompts if isinstance(prompt, str)]
        self.check(len(suffix), "suffix")
        for length in lengths:
            self.check(length, "prompt")

        def encode() -> tuple[list[list[int]], Sequence[int]]:
            fill = self._infilling
            made = (fill.prompt(prompt, suffix, add_special_tokens=add_special_tokens) for prompt in prompts)
            return list(made), fill.ends

        try:
            return await self._run(sum(lengths) + len(suffix) * len(prompts), encode)
        except InputError as error:
            raise ApiError(400, error.sentence, param="suffix") from error

    @cached_property
    def _infilling(self) -> Infilling:
        return Infilling(self._tokenizer)

    async def chat(self, turns: Sequence[Mapping[str, Any]], **settings: Any) -> list[int]:
        """The tokens of a conversation up to where the model answers, as `bitstrata chat` makes them.

        settings: of `encode_turns`.

        Raises:
            ApiError: 400 for texts that cannot fit, and where `encode_turns` raises InputError.
            UsageError: as `encode_turns`.
        """
        try:
            characters = text_length(turns)
        except InputError as error:
            raise ApiError(400, error.sentence, param="messages") from error
        self.check(characters, "messages")
        try:  # aside however short they are: a template is a program, and may run for long on nothing
            return await self._run(characters, lambda: encode_turns(self._tokenizer, turns, **settings))
        except InputError as error:
            raise ApiError(400, error.sentence, param="messages") from error

    async def pieces(self, prompts: Sequence[Sequence[int]]) -> list[list[str]]:
        """What each token adds to the text of its prompt."""
        return await self._run(sum(map(len, prompts)), lambda: [pieces(self._tokenizer, prompt) for prompt in prompts])

    async def text(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, special ones included."""
        return await self._run(len(tokens), lambda: str(self._tokenizer.decode(list(tokens))))

    def check(self, characters: int, param: str) -> None:
        """Raises ApiError 400 if no text of this length can fit."""
        if characters > self.most:
            raise ApiError(
                400,
                f"{param} has {characters} characters; this server reads at most {self.most} of a prompt, which is "
                f"{self._room} tokens of {self._token} each",
                param=param,
                code="context_length_exceeded",
            )

    async def _run(self, characters: int, work: Callable[[], T]) -> T:
        """The result of `work`, in another thread; a few at a time where texts are long."""
        if characters <= LONG:
            return await asyncio.to_thread(work)
        return await asyncio.get_running_loop().run_in_executor(self._long, work)


class Detokenizer:
    """The text of one request's new tokens.

    Args:
        context: the tokens before them, where the text continues theirs; nothing where it stands alone.
            A character that they leave half may be lost.
        skip_special_tokens: whether they have no text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer, self._skips = tokenizer, skip_special_tokens
        self._window = list(context[-CONTEXT:])
        while self._window and self._decode().startswith(REPLACEMENT):
            del self._window[0]  # the middle of a character: with it, decoders may spoil what follows
        self._given = len(self._decode().rstrip(REPLACEMENT))  # characters of the window's text
        self._pending = 0  # tokens since the text ended in a whole character
        self._whole = deque([len(self._window)], maxlen=CONTEXT)  # the latest such places in the window

    def push(self, token: int) -> str:
        """The text that became sure with `token`."""
        self._window.append(token)
        text = self._decode()
        sure = text.rstrip(REPLACEMENT) if self._pending < PENDING else text
        new = sure[self._given :]
        if new:
            self._given = len(sure)
        if sure == text:
            self._pending = 0
            self._whole.append(len(self._window))
            self._forget()
        else:
            self._pending = 1 if new else self._pending + 1
        return new

    def flush(self) -> str:
        """What is left when no more tokens come."""
        text = self._decode()[self._given :]
        self._given += len(text)
        return text

    def _forget(self) -> None:
        """Drop the oldest tokens of a long window, up to the end of a whole character."""
        cut = self._whole[0]
        if len(self._window) > WINDOW and cut < len(self._window):
            del self._window[:cut]
            self._whole = deque((place - cut for place in self._whole), maxlen=CONTEXT)
            self._given = len(self._decode())

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._window, skip_special_tokens=self._skips))


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """What each token adds to the text of `tokens`, special ones that the tokenizer puts in front of texts left out."""
    before = text_prefix(tokenizer)
    begin = len(before) if list(tokens[: len(before)]) == before else 0
    text = Detokenizer(tokenizer, skip_special_tokens=False)
    found = [*[""] * begin, *map(text.push, tokens[begin:])]
    if found:
        found[-1] += text.flush()
    return found


class StopTexts:
    """Cuts a text that comes in pieces before the first of the texts `stops`."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False
        self.stop = ""  # the one that was found

    def push(self, piece: str) -> str:
        """What can be given of the text so far; nothing more once a stop text is found."""
        if self.found:
            return ""
        text = self._held + piece
        places = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found = True
            self._held = ""
            place, self.stop = min(places)
            return text[:place]
        sure = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[sure:]
        return text[:sure]

    def flush(self) -> str:
        """What is left when the text has ended."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that may be the beginning of `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


class ReplyText:
    """The text of one reply: detokenized, and cut before the first stop text.

    shown: special tokens that have a text here, and it. hidden: tokens that have none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context: Sequence[int],
        stops: Iterable[str],
        shown: Mapping[int, str] | None = None,
        hidden: Sequence[int] = (),
    ) -> None:
        self._shown, self._hidden = shown or {}, hidden
        self._tokenizer, self._detokenizer = tokenizer, Detokenizer(tokenizer, context)
        self._marks: dict[int, str] = {}  # of special tokens in stop texts
        if texts := tuple(stops):
            read = Stops(tokenizer, texts)
            texts, self._marks = read.texts, read.marks
        self._unmark = dict.fromkeys(map(ord, self._marks.values()))
        self._stops = StopTexts(texts)
        self.length = 0  # characters so far, those that are held back included

    @property
    def stopped(self) -> bool:
        """Whether a stop text was found."""
        return self._stops.found

    @property
    def stop(self) -> str | None:
        """The stop text that was found."""
        names: dict[str, str | int | None] = {
            character: str(self._tokenizer.convert_ids_to_tokens(token)) for token, character in self._marks.items()
        }
        return self._stops.stop.translate(str.maketrans(names)) if self.stopped else None

    def push(self, token: int) -> str:
        piece = "" if token in self._hidden else self._detokenizer.push(token) + self._shown.get(token, "")
        self.length += len(piece)
        return self._stops.push(piece + self._marks.get(token, "")).translate(self._unmark)

    def flush(self) -> str:
        return (self._stops.push(self._detokenizer.flush()) + self._stops.flush()).translate(self._unmark)


class TokenNames:
    """What single tokens stand for, as log-probabilities show them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.of = lru_cache(maxsize=16384)(self._of)

    def _of(self, token: int) -> tuple[str, bytes]:
        """(text, bytes) of a token. A part of a character has the text `bytes:\\xe2\\x82`, as at OpenAI."""
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        text = str(self._tokenizer.decode([token]))
        raw = text.encode()
        if REPLACEMENT in text:
            raw = _bytes_of(piece, text)
        elif piece.startswith("\N{LOWER ONE EIGHTH BLOCK}") and not text.startswith(" "):
            raw = b" " + raw  # SentencePiece: alone a token loses its space
        try:
            return raw.decode(), raw
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw


def _bytes_of(piece: str, text: str) -> bytes:
    """The bytes of a token that is not whole characters, from its name in the vocabulary; else those of `text`."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    if all(character in _BYTE_LEVEL for character in piece):
        raw = bytes(_BYTE_LEVEL[character] for character in piece)
        if raw.decode(errors="replace") == text:
            return raw
    return text.encode()
