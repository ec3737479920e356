"""A conversation as a client sends it -> what is generated: the same for every API that has conversations."""

from __future__ import annotations

from typing import Any

from ..errors import InputError, UsageError
from ..models import is_template_variable, template_knows
from ..runtime.tools import shown_turns
from .answer import GenerationSpec
from .errors import ApiError
from .fields import Notice
from .notices import Notices
from .requests import ChatBody
from .service import Service
from .tools import ToolUse, held, most_calls
from .turns import ConversationBody


async def conversation_tokens(service: Service, body: ConversationBody, notices: Notices) -> list[int]:
    """The tokens of a conversation, up to where the model answers; it is told of the functions that it may call.

    Raises ApiError for what the chat template cannot show, and as PromptEncoder.chat.
    """
    given = _variables(service, body, notices)
    try:
        turns, variables, _ = shown_turns(service.tokenizer, [message.turn for message in body.messages], body.offered)
    except InputError as error:
        raise ApiError(400, error.sentence, param="tools") from error
    return await service.prompts.chat(
        turns,
        variables={**given, **variables},
        goes_on=body.continues and bool(service.tokenizer.chat_template),
        generation_prompt=body.add_generation_prompt is not False,
    )


async def chat_spec(service: Service, body: ChatBody, notices: Notices) -> GenerationSpec:
    """What `body` asks for. Raises ApiError, and as `conversation_tokens`."""
    precision = service.catalog.precision(body.model, body.bits)  # refused before anything is tokenized
    tools, constraint, use = body.offered, body.constraint, None
    prompt = await conversation_tokens(service, body, notices)
    if tools:
        _, _, form = shown_turns(service.tokenizer, [], tools)
        choice, most = body.tool_choice, most_calls(body.tool_choice, body.parallel_tool_calls)
        use = ToolUse(form, most)
        try:
            constraint = held(service.tokenizer, form, tools, choice, most, constraint)
        except UsageError as error:
            raise ApiError(400, error.sentence, param="tools") from error
    return GenerationSpec(
        prompts=[prompt],
        precision=precision,
        notices=notices,
        continues=body.continues or not service.tokenizer.chat_template,
        max_tokens=body.new_tokens,
        default_tokens=service.settings.default_max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=constraint,
        tools=use,
    )


def _variables(service: Service, body: ConversationBody, notices: Notices) -> dict[str, Any]:
    """What the chat template is told beside the turns. Raises ApiError for names that are not the client's to give."""
    given = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        given.setdefault("reasoning_effort", body.reasoning_effort)
    for name in list(given):
        if not is_template_variable(name):
            raise ApiError(
                400, f"{name[:60]!r} is not a variable to give to a chat template", param="chat_template_kwargs"
            )
        if not template_knows(service.tokenizer, name):
            del given[name]
            if name != "reasoning_effort" or body.reasoning_effort != "none":
                shown = name[:60]
                said = f"{shown} was ignored: this model's chat template does not know it"
                notices.add(Notice(shown, said, f"{shown}: this model's chat template does not know it"))
    return given
