"""The tokenizer's work: aside of the event loop, a little of it at a time, and none on what cannot fit.

Tokenizing takes about a hundred times the text's own memory, and seconds where it is megabytes. So a text is refused
unread if it is longer than as many of the longest tokens as there is room for, and of the long ones that are left only
LONG_AT_ONCE are tokenized at a time. What the characters of a text cannot tell is found out afterwards, by its tokens.

No text that would have fitted is refused unless its tokenizer drops much of it: runs of spaces, say, or characters that
it does not know. Where texts are normalised first, which may join up to JOINED characters in one, so many count as one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from .failures import ApiError

LONG = 2000  # characters from which on a text is long
LONG_AT_ONCE = 2
JOINED = 4  # a letter and its marks, the most that Unicode composes into one
T = TypeVar("T")


class Aside:
    """
    Args:
        room: tokens that a prompt may have.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, room: int) -> None:
        self._room = room
        self._token = max(map(len, tokenizer.get_vocab()), default=1)  # characters; of byte-level ones at least as many
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or backend.normalizer is not None:
            self._token *= JOINED
        self.most = room * self._token  # characters
        self._long = ThreadPoolExecutor(LONG_AT_ONCE, thread_name_prefix="bitstrata-tokenizer")

    def check(self, characters: int, param: str) -> None:
        """Raises ApiError 400 if no text of so many characters can fit."""
        if characters > self.most:
            raise ApiError(
                400,
                f"{param} has {characters} characters; this server reads at most {self.most} of a prompt, which is "
                f"{self._room} tokens of {self._token} each",
                param=param,
                code="context_length_exceeded",
            )

    async def run(self, characters: int, work: Callable[[], T]) -> T:
        """The result of `work` on so many characters, in another thread."""
        if characters <= LONG:
            return await asyncio.to_thread(work)
        return await asyncio.get_running_loop().run_in_executor(self._long, work)
