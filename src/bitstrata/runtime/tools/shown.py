"""How a model is told of functions: by its own chat template, or in words where that does not know them.

A template that takes `tools` gets them as they are, and so do earlier calls and their results. For another the
functions and the form of a call are explained in the system's turn, calls become text of the assistant's turns, and
results turns of the user's. A model that was not trained for tools follows that as well as it follows instructions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...errors import InputError
from ...models import encode_turns, template_knows
from .formats import PLAIN, ToolFormat, format_of

Turn = Mapping[str, Any]
EXPLAINED = """You can call functions. To call one, answer only with its name and arguments, in this form:
<tool_call>
{"name": "the function's name", "arguments": {...}}
</tool_call>
The functions, each with the JSON schema of its arguments:
"""


@dataclass(frozen=True)
class Tool:
    """A function. parameters: the JSON schema of its arguments. strict: arguments must fit it in any case."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    strict: bool = False

    @property
    def function(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}


def shown_turns(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], tools: Sequence[Tool]
) -> tuple[list[Turn], dict[str, Any], ToolFormat]:
    """Turns and variables for the chat template that tell a model of `tools`, and the form in which it will call.

    Without tools what earlier turns say of calls is shown all the same. Raises InputError for tools
    or calls without a template.
    """
    has_calls = any(turn["role"] == "tool" or turn.get("tool_calls") for turn in turns)
    if (tools or has_calls) and not tokenizer.chat_template:
        raise InputError(
            "tools and tool_calls need a chat template, and this tokenizer has none",
            hint="leave them out: the model continues text",
        )
    form = format_of(tokenizer)
    knows_tools = form is not None and template_knows(tokenizer, "tools")
    shown = list(turns)
    if not knows_tools and not template_knows(tokenizer, "tool_calls"):
        shown = _in_words(shown)
    if not tools or knows_tools:
        functions = [{"type": "function", "function": tool.function} for tool in tools]
        return shown, {"tools": functions} if tools else {}, form if form is not None and knows_tools else PLAIN
    lines = [json.dumps(tool.function, ensure_ascii=False) for tool in tools]
    return _with_system(tokenizer, shown, EXPLAINED + "\n".join(lines)), {}, PLAIN


def _in_words(turns: Sequence[Turn]) -> list[Turn]:
    """Calls as text, and results as turns of the user's, several at once in one."""
    shown: list[Turn] = []
    merges = False
    for turn in turns:
        if turn["role"] == "tool":
            text = f"<tool_response>\n{turn['content']}\n</tool_response>"
            if merges:
                text = f"{shown.pop()['content']}\n{text}"
            shown.append({"role": "user", "content": text})
        elif turn.get("tool_calls"):
            calls = [
                json.dumps({"name": call["function"]["name"], "arguments": call["function"]["arguments"]})
                for call in turn["tool_calls"]
            ]
            said = [turn["content"]] if turn.get("content") else []
            text = "\n".join([*said, *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)])
            shown.append({**{key: value for key, value in turn.items() if key != "tool_calls"}, "content": text})
        else:
            shown.append(turn)
        merges = turn["role"] == "tool"
    return shown


def _with_system(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], text: str) -> list[Turn]:
    """`turns` with `text` in the system's turn, or in the first one where the template takes none of the system's."""
    if not turns:
        return []
    first = turns[0]
    if first["role"] != "system":
        try:
            encode_turns(tokenizer, [{"role": "system", "content": text}, {"role": "user", "content": "?"}])
        except InputError:
            pass
        else:
            return [{"role": "system", "content": text}, *turns]
    return [{**first, "content": f"{text}\n\n{first['content']}" if first["content"] else text}, *turns[1:]]
