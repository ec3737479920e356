"""From the texts of a request to tokens, off the event loop where they are long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from ..models import encode_prompt, encode_turns
from .failures import ApiError
from .requests import Message

SHORT = 2000  # characters that are tokenized at once, in less time than handing them to a thread and back
T = TypeVar("T")


async def completion_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str] | Sequence[list[int]], *, add_special_tokens: bool = True
) -> list[list[int]]:
    """The tokens of each prompt of /v1/completions, as `bitstrata generate` makes them; tokens stay as they are.

    Control tokens that a prompt spells are control tokens. add_special_tokens: as in `encode_prompt`.

    Raises InputError for a prompt without tokens.
    """

    def encode() -> list[list[int]]:
        return [
            encode_prompt(tokenizer, prompt, add_special_tokens=add_special_tokens)
            if isinstance(prompt, str)
            else prompt
            for prompt in prompts
        ]

    return await _aside(sum(len(prompt) for prompt in prompts if isinstance(prompt, str)), encode)


async def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The tokens of a conversation up to where the model answers, as `bitstrata chat` makes them.

    Raises ApiError 400, and UsageError, where `encode_turns` raises InputError and UsageError.
    """
    # OpenAI's newer name of a system message; templates know the older one
    roles = ["system" if message.role == "developer" else message.role for message in messages]
    turns = [{"role": role, "content": message.content} for role, message in zip(roles, messages, strict=True)]

    def encode() -> list[int]:
        try:
            return encode_turns(tokenizer, turns)
        except InputError as error:
            message = f"{error.message}; {error.hint}" if error.hint else error.message
            raise ApiError(400, message, param="messages") from error

    return await _aside(sum(len(turn["content"]) for turn in turns), encode)


async def _aside(size: int, work: Callable[[], T]) -> T:
    return work() if size <= SHORT else await asyncio.to_thread(work)
