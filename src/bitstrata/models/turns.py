"""Conversations -> tokens, by the tokenizer's chat template.

Control tokens are the template's alone. Where a turn spells one (`<|im_end|>`), in what it says, in the arguments of a
tool call or anywhere else, its characters are encoded as any other text, so that no turn can end itself and begin
another's.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import BitstrataError, InputError, UsageError
from .compat import text_control_tokens
from .tokens import added_tokens, around, check_text, encode_prompt

PRIVATE_USE = range(0xF0000, 0xFFFFE)  # characters without a meaning: marks in rendered conversations
MOST_DEPTH = 50  # of objects in a turn
ANSWER = "An answer."  # of a made turn
SET_BY_US = {"bos_token", "eos_token", "unk_token", "pad_token", "messages", "raise_exception", "strftime_now"}

Range = tuple[int, int]
Turn = Mapping[str, Any]


def template_knows(tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Whether the tokenizer's chat template mentions `name`: a variable, a role, a field of messages."""
    source = str(tokenizer.get_chat_template()) if tokenizer.chat_template else ""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", source) is not None


def is_template_variable(name: str) -> bool:
    """Whether a caller may give chat templates a variable of this name: it is none that they always get."""
    return (
        name not in SET_BY_US and name not in inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    )


def text_length(turns: Sequence[Turn]) -> int:
    """Characters of all texts in `turns`. Raises InputError where they are nested too deep."""
    return sum(map(len, _texts(list(turns))))


def encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Turn],
    *,
    variables: Mapping[str, Any] | None = None,
    goes_on: bool = False,
    generation_prompt: bool = True,
) -> list[int]:
    """The tokens of `turns`, each with a `role` and a `content`, up to where the model answers.

    By the tokenizer's chat template; without one the text of all turns, one after the other. Where no turn spells a
    control token, these are the tokens of `apply_chat_template`.

    Args:
        turns: may have other fields that the template knows, such as `tool_calls`.
        variables: of the template; their names are as `is_template_variable` wants them.
        goes_on: the last turn is not ended: the model goes on with it.
        generation_prompt: whether the model's turn is begun.

    Raises:
        UsageError: a system instruction, or a tool's turn, without a chat template.
        InputError: nothing to continue, half a surrogate pair, turns that the template refuses (in its own words),
            a control token that the tokenizer cannot tell from text.
    """
    given = dict(variables or {})
    for turn in turns:
        for text in _texts(turn):
            check_text(text, f"what the {turn['role']} says")
    for text in _texts(given):
        check_text(text, "a variable of the chat template")
    if not tokenizer.chat_template:
        for role, what in (("system", "a system instruction"), ("tool", "a tool's turn")):
            if any(turn["role"] == role for turn in turns):
                raise UsageError(
                    f"{what} needs a chat template, and this tokenizer has none",
                    hint="leave it out: the model continues text, it was not trained to be instructed",
                )
        return _encode_joined(tokenizer, "".join(turn["content"] for turn in turns))

    def applied(turns: Sequence[Turn], variables: Mapping[str, Any], *, tokenize: bool) -> Any:
        settings = {"add_generation_prompt": generation_prompt and not goes_on, "continue_final_message": goes_on}
        return _apply_template(tokenizer, turns, {**variables, **settings}, tokenize=tokenize)

    special, others = _control_tokens(tokenizer)
    # the model itself may write what is not special, such as <think> or <tool_call>
    allowed = [special if turn["role"] == "assistant" else special | others for turn in turns]
    forged = [
        {text: ranges for text in _texts(part) if (ranges := _spelled_tokens(tokenizer, text, names))}
        for part, names in zip([*turns, given], [*allowed, special | others], strict=True)
    ]
    if not any(forged):
        return list(applied(turns, given, tokenize=True))
    marks = _Marks.unused_in([*turns, given])
    *marked, variables = (
        _with_texts(part, lambda text, found=found: marks.put(text, found.get(text, ())))  # type: ignore[misc]
        for part, found in zip([*turns, given], forged, strict=True)
    )
    text, ranges = marks.take(str(applied(marked, variables, tokenize=False)))
    return _encode_spelled(tokenizer, text, ranges, special | others, add_special_tokens=False)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> frozenset[int]:
    """The tokens that end a text or a turn.

    Those that the generation config, the config and the tokenizer name, and the one that the chat template writes
    behind an answer, which some models' files do not name.
    """
    holders = (model.generation_config, model.config, model.config.get_text_config(decoder=True), tokenizer)
    found: set[int] = set() if tokenizer is None else set(_turn_end(tokenizer))
    for holder in holders:
        ends = getattr(holder, "eos_token_id", None)
        found |= {ends} if isinstance(ends, int) else set(ends or ())
    return frozenset(found)


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The control token that the chat template writes behind an answer, if that is what it writes there."""
    if not tokenizer.chat_template:
        return []
    turns = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": ANSWER}]
    try:
        text = str(_apply_template(tokenizer, turns, {}, tokenize=False))
    except InputError:  # it wants other turns than these
        return []
    behind = text.rpartition(ANSWER)[2].lstrip() if ANSWER in text else ""
    special, others = _control_tokens(tokenizer)
    ids = tokenizer.encode(behind, add_special_tokens=False)[:1] if behind else []
    return [
        token
        for token in ids
        if token in special | others and behind.startswith(added_tokens(tokenizer)[token].content)
    ]


def _texts(value: Any, depth: int = MOST_DEPTH) -> Iterator[str]:
    """Every text in a turn, or in a part of one, but for the names of fields."""
    if not depth:
        raise InputError(f"a turn is nested more than {MOST_DEPTH} deep", hint="make it simpler")
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item, depth - 1)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, depth - 1)


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every text changed, but for the names of fields and of roles."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: item if key == "role" else _with_texts(item, change) for key, item in value.items()}
    return [_with_texts(item, change) for item in value] if isinstance(value, list | tuple) else value


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], variables: Mapping[str, Any], *, tokenize: bool
) -> Any:
    try:
        return tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], tokenize=tokenize, return_dict=False, **variables
        )
    except BitstrataError:
        raise
    except Exception as error:  # a template is a program that comes with the model: it may raise anything
        said = str(error) or type(error).__name__
        raise InputError(f"the chat template refuses these messages: {said}") from error


def _encode_joined(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A conversation without a template: one text to be continued."""
    special, _ = _control_tokens(tokenizer)
    if not _spelled_tokens(tokenizer, text, special):
        return encode_prompt(tokenizer, text)
    ids = _encode_spelled(tokenizer, text, [(0, len(text))], special, add_special_tokens=True)
    return ids[: len(ids) - len(around(tokenizer)[1])]


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[frozenset[int], frozenset[int]]:
    """Added tokens that are special, and those that are not and that the chat template writes.

    Other added tokens are words like any other. A template writes spaces and line ends as text.
    """
    listed = text_control_tokens(tokenizer)
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    special, others = set(), set()
    for number, token in added_tokens(tokenizer).items():
        if token.special:
            special.add(number)
        elif (
            token.content in listed if listed is not None else not token.content.isspace() and token.content in template
        ):
            others.add(number)
    return frozenset(special), frozenset(others)


def _spelled_tokens(tokenizer: PreTrainedTokenizerBase, text: str, control: frozenset[int]) -> list[Range]:
    """Where `text` spells a token of `control`: (start, end) in characters.

    Raises InputError if the tokenizer cannot say where: only those of the tokenizers library can.
    """
    if not tokenizer.is_fast:
        names = [added_tokens(tokenizer)[number].content for number in control]
        if any(name in text for name in names):
            raise InputError(
                "a message spells a control token, and this tokenizer cannot take it as text",
                hint="leave it out, or put the model's tokenizer.json into its folder",
            )
        return []
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        (start, end)
        for token, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
        if token in control and _is_spelled(tokenizer, token, text[start:end])
    ]


def _is_spelled(tokenizer: PreTrainedTokenizerBase, token: int, text: str) -> bool:
    """Whether the control token `token` stands for `text` because it is spelled there.

    What the tokenizer puts around a text stands for nothing, and <unk> also for what the vocabulary lacks.
    """
    return bool(text) and (token != tokenizer.unk_token_id or tokenizer.unk_token in text)


def _encode_spelled(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    ranges: Sequence[Range],
    control: frozenset[int],
    *,
    add_special_tokens: bool,
) -> list[int]:
    """The tokens of `text`, those of `control` that touch `ranges`, ascending and apart, encoded as text."""
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
    ids: list[int] = []
    as_text: dict[tuple[int, str], list[int]] = {}
    left = iter(ranges)
    begin, stop = next(left, (len(text), len(text)))
    for token, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
        while stop <= start < len(text):
            begin, stop = next(left, (len(text), len(text)))
        spelled = text[start:end]
        if begin < end and token in control and _is_spelled(tokenizer, token, spelled):
            if (token, spelled) not in as_text:
                as_text[token, spelled] = _as_text(tokenizer, token, spelled)
            ids += as_text[token, spelled]
        else:
            ids.append(token)
    return ids


def _as_text(tokenizer: PreTrainedTokenizerBase, token: int, text: str) -> list[int]:
    """The tokens of `text`, which spells the control token `token`, inside of a longer text.

    Raises InputError if there are no others.
    """
    backend: Any = tokenizer.backend_tokenizer

    def encode(text: str) -> list[int]:  # encode_special_tokens would do it too, but is a state that threads share
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        pieces = [text]
        if backend.pre_tokenizer is not None:
            pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [found.id for piece in pieces for found in backend.model.tokenize(piece)]

    line_end, ids = encode("\n"), encode("\n" + text)  # SentencePiece begins a text, not a line, with a space
    ids = ids[len(line_end) :] if ids[: len(line_end)] == line_end else encode(text)
    if token in ids and token != tokenizer.unk_token_id:
        raise InputError(f"the tokenizer takes {text!r} for a control token even as text", hint="leave it out")
    return ids


class _Marks:
    """Two characters around each character of a range, by which it is found again in what a template made of a text.

    Each character has its own because templates cut texts up.
    """

    def __init__(self, opening: str, closing: str) -> None:
        self.opening, self.closing = opening, closing

    @classmethod
    def unused_in(cls, turns: Sequence[Turn]) -> _Marks:
        """Of characters that no turn contains. Raises InputError if there are none."""
        used = set().union(*_texts(list(turns)))
        free = [chr(code) for code in PRIVATE_USE if chr(code) not in used][:2]
        if len(free) < 2:
            raise InputError("the messages hold every character of Unicode's private plane 15", hint="leave some out")
        return cls(*free)

    def put(self, text: str, ranges: Sequence[Range]) -> str:
        """`text` with marks in `ranges`, ascending and apart."""
        parts, at = [], 0
        for start, end in ranges:
            parts.append(text[at:start])
            parts += [f"{self.opening}{character}{self.closing}" for character in text[start:end]]
            at = end
        return "".join([*parts, text[at:]])

    def take(self, text: str) -> tuple[str, list[Range]]:
        """`text` without the marks, and the ranges of the characters that have both of theirs."""
        parts: list[str] = []
        ranges: list[Range] = []
        at = length = 0
        for match in re.finditer(f"{self.opening}(.){self.closing}|[{self.opening}{self.closing}]", text, re.DOTALL):
            parts.append(text[at : match.start()])
            length += match.start() - at
            at = match.end()
            if match.group(1):
                parts.append(match.group(1))
                ranges.append((length, length + 1))
                length += 1
        return "".join([*parts, text[at:]]), ranges
