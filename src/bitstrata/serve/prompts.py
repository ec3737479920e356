"""From the texts of a request to tokens, off the event loop where they are long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from ..errors import BitstrataError
from ..runtime import encode_prompt, encode_turns
from .failures import ApiError
from .requests import Message

SHORT = 2000  # characters that are tokenized at once, in less time than handing them to a thread and back
T = TypeVar("T")


async def completion_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[int]) -> list[int]:
    """The tokens of one prompt of /v1/completions, as `bitstrata generate` makes them; tokens stay as they are.

    Raises InputError for an empty prompt of a tokenizer without BOS.
    """
    if not isinstance(prompt, str):
        return prompt
    return await _aside(len(prompt), lambda: encode_prompt(tokenizer, prompt))


async def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The tokens of a conversation up to where the model answers, as `bitstrata chat` makes them.

    Raises:
        ApiError: 400 with the chat template's own words if it refuses the messages.
        UsageError, InputError: as `encode_turns`.
    """
    # OpenAI's newer name of a system message; templates know the older one
    roles = ["system" if message.role == "developer" else message.role for message in messages]
    turns = [{"role": role, "content": message.content} for role, message in zip(roles, messages, strict=True)]

    def encode() -> list[int]:
        try:
            return encode_turns(tokenizer, turns)
        except BitstrataError:
            raise
        except Exception as error:  # a template is a program that comes with the model: it may raise anything
            said = str(error) or type(error).__name__
            raise ApiError(400, f"the chat template refuses these messages: {said}", param="messages") from error

    return await _aside(sum(len(turn["content"]) for turn in turns), encode)


async def _aside(size: int, work: Callable[[], T]) -> T:
    return work() if size <= SHORT else await asyncio.to_thread(work)
