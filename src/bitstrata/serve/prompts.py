"""From the texts of a request to tokens."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from ..models import encode_prompt, encode_turns
from .aside import Aside
from .failures import ApiError
from .requests import Message


async def completion_prompts(
    tokenizer: PreTrainedTokenizerBase,
    aside: Aside,
    prompts: Sequence[str] | Sequence[list[int]],
    *,
    add_special_tokens: bool = True,
) -> list[list[int]]:
    """The tokens of each prompt of /v1/completions, as `bitstrata generate` makes them; tokens stay as they are.

    Control tokens that a prompt spells are control tokens. add_special_tokens: as in `encode_prompt`.

    Raises:
        ApiError: 400 for a text that cannot fit.
        InputError: a prompt without tokens.
    """
    lengths = [len(prompt) for prompt in prompts if isinstance(prompt, str)]
    for length in lengths:
        aside.check(length, "prompt")

    def encode() -> list[list[int]]:
        return [
            encode_prompt(tokenizer, prompt, add_special_tokens=add_special_tokens)
            if isinstance(prompt, str)
            else prompt
            for prompt in prompts
        ]

    return await aside.run(sum(lengths), encode) if lengths else encode()


async def chat_prompt(tokenizer: PreTrainedTokenizerBase, aside: Aside, messages: Sequence[Message]) -> list[int]:
    """The tokens of a conversation up to where the model answers, as `bitstrata chat` makes them.

    Raises:
        ApiError: 400 for texts that cannot fit, and where `encode_turns` raises InputError.
        UsageError: as `encode_turns`.
    """
    characters = sum(len(message.content) for message in messages)
    aside.check(characters, "messages")
    # OpenAI's newer name of a system message; templates know the older one
    roles = ["system" if message.role == "developer" else message.role for message in messages]
    turns = [{"role": role, "content": message.content} for role, message in zip(roles, messages, strict=True)]

    def encode() -> list[int]:
        try:
            return encode_turns(tokenizer, turns)
        except InputError as error:
            message = f"{error.message}; {error.hint}" if error.hint else error.message
            raise ApiError(400, message, param="messages") from error

    # aside however short they are: a template is a program, and may run for long on nothing
    return await aside.run(characters, encode)
