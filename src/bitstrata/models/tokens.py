"""Texts -> tokens, as the tokenizer itself makes them.

A text starts with what `tokenizer(text)` puts in front of it: BOS where the tokenizer adds one, other tokens (GLM's
`[gMASK]<sop>`) where it has those, nothing where it adds nothing, whatever `bos_token_id` says. What it puts behind
a text (EOS, with add_eos_token) is left out: what is to go on must not begin with its end.

In a conversation control tokens are the chat template's alone. Where a message spells one (`<|im_end|>`), its
characters are encoded as any other text, so that no message can end its turn and begin another's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.reader import regular_file
from ..errors import BitstrataError, InputError, UsageError, first_line
from .compat import text_control_tokens

PROBES = ("a", "0", " ", "\n", "\N{CJK UNIFIED IDEOGRAPH-4E00}")
PRIVATE_USE = range(0xF0000, 0xFFFFE)  # characters without a meaning: marks in rendered conversations

Range = tuple[int, int]


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. Raises InputError if there is none, or if it cannot be read or used."""
    try:
        for path in Path(folder).iterdir():
            regular_file(path, InputError)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        tokenizer.decode(tokenizer("a").input_ids)  # some values are looked at when they are used, and not before
    except BitstrataError:
        raise
    except Exception as error:
        raise InputError(
            f"{folder} has no usable tokenizer: {first_line(error)}",
            hint="copy tokenizer.json and tokenizer_config.json of the model into the folder",
        ) from error
    if not isinstance(tokenizer.chat_template, str | dict | None):
        raise InputError(
            f"{folder}: chat_template is a {type(tokenizer.chat_template).__name__}, not a template",
            hint="correct it in tokenizer_config.json",
        )
    return tokenizer


def encode_body(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of `text` alone, without what the tokenizer puts around it.

    Raises InputError for half a surrogate pair, which is no text.
    """
    check_text(text)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return ids


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, add_special_tokens: bool = True) -> list[int]:
    """The tokens of a text that is to be continued: `tokenizer(prompt)`, without what it puts behind.

    Control tokens that the prompt spells are control tokens. add_special_tokens: False leaves out what the tokenizer
    puts in front, for a prompt that has it already.

    Raises InputError if there are no tokens, or for half a surrogate pair.
    """
    if add_special_tokens:
        check_text(prompt)
        ids: list[int] = tokenizer.encode(prompt, verbose=False)
        ids = ids[: len(ids) - len(around(tokenizer)[1])]
    else:
        ids = encode_body(tokenizer, prompt)
    if not ids:
        raise InputError("the prompt is empty", hint="give at least one word")
    return ids


def around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts in front of a text and behind it.

    Raises InputError for a tokenizer that encodes nothing.
    """
    for probe in PROBES:
        body: list[int] = tokenizer.encode(probe, add_special_tokens=False)
        whole: list[int] = tokenizer.encode(probe)
        for start in range(len(whole) - len(body) + 1):
            if body and whole[start : start + len(body)] == body:
                return whole[:start], whole[start + len(body) :]
    raise InputError(
        "the tokenizer gives no tokens for a letter, a digit or a space", hint="put the model's own tokenizer there"
    )


def text_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of every text; empty for many."""
    return around(tokenizer)[0]


def check_text(text: str, what: str = "the text") -> None:
    """Raise InputError for half a surrogate pair: bytes that were not UTF-8 where they were typed or piped."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} holds half a character, {text[error.start]!r} after {text[: error.start][-20:]!r}",
            hint="give it as whole characters in UTF-8",
        ) from None


def vocabulary_size(config: PreTrainedConfig) -> int:
    """Tokens that a model of this config tells apart."""
    return int(config.get_text_config(decoder=True).vocab_size)


def check_vocabulary(tokens: Iterable[int], config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError if one of the tokenizer's `tokens` is beyond the model's vocabulary."""
    largest, size = max(tokens, default=0), vocabulary_size(config)
    if largest >= size:
        raise InputError(
            f"the tokenizer gives token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), "
            f"the model knows {size} tokens, 0 to {size - 1}",
            hint="put the model's own tokenizer into its folder",
        )


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> frozenset[int]:
    """The tokens that end a text or a turn: those of the generation config, the config and the tokenizer together."""
    holders = (model.generation_config, model.config, model.config.get_text_config(decoder=True), tokenizer)
    found: set[int] = set()
    for holder in holders:
        ends = getattr(holder, "eos_token_id", None)
        found |= {ends} if isinstance(ends, int) else set(ends or ())
    return frozenset(found)


class Stops:
    """Texts that end a reply, special tokens in them included.

    Decoded text does not show special tokens. Those that a stop text spells are shown as half surrogates, which no
    decoded text contains: `marks` has the character of each, `texts` the stop texts as given and with the marks.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> None:
        given = tuple(texts)
        special = {token.content: number for number, token in _added_tokens(tokenizer).items() if token.special}
        spelled = [name for name in special if any(name in text for text in given)]
        mark = {name: chr(0xD800 + index) for index, name in enumerate(spelled)}
        self.marks = {special[name]: character for name, character in mark.items()}
        self.texts, self._tokenizer = given, tokenizer
        if mark:
            names = "|".join(map(re.escape, sorted(mark, key=len, reverse=True)))
            marked = (re.sub(names, lambda match: mark[match.group()], text) for text in given)
            self.texts = tuple(dict.fromkeys((*given, *marked)))

    def found_in(self, tokens: Sequence[int]) -> bool:
        """Whether one of the texts is in the text of `tokens`."""
        parts, at = [], 0
        for place, token in enumerate(tokens):
            if token in self.marks:
                parts += [self._decode(tokens[at:place]), self.marks[token]]
                at = place + 1
        text = "".join([*parts, self._decode(tokens[at:])])
        return any(stop in text for stop in self.texts)

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True)) if tokens else ""


def encode_turns(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]]) -> list[int]:
    """The tokens of `turns`, each with a `role` and a `content`, up to where the model answers.

    By the tokenizer's chat template; without one the text of all turns, one after the other. Where no content
    spells a control token, these are the tokens of `apply_chat_template`.

    Raises:
        UsageError: a system instruction without a chat template.
        InputError: nothing to continue, half a surrogate pair, turns that the template refuses (in its own words),
            a control token that the tokenizer cannot tell from text.
    """
    for turn in turns:
        check_text(turn["content"], f"what the {turn['role']} says")
    if not tokenizer.chat_template:
        if any(turn["role"] == "system" for turn in turns):
            raise UsageError(
                "a system instruction needs a chat template, and this tokenizer has none",
                hint="leave it out: the model continues text, it was not trained to be instructed",
            )
        return _encode_joined(tokenizer, "".join(turn["content"] for turn in turns))
    special, others = _control_tokens(tokenizer)
    # the model itself may write what is not special, such as <think> or <tool_call>
    allowed = [special if turn["role"] == "assistant" else special | others for turn in turns]
    forged = [_spelled_tokens(tokenizer, turn["content"], names) for turn, names in zip(turns, allowed, strict=True)]
    if not any(forged):
        return list(_apply_template(tokenizer, turns, tokenize=True))
    marks = _Marks.unused_in(turns)
    marked = [
        {**turn, "content": marks.put(turn["content"], ranges)} for turn, ranges in zip(turns, forged, strict=True)
    ]
    text, ranges = marks.take(str(_apply_template(tokenizer, marked, tokenize=False)))
    return _encode_spelled(tokenizer, text, ranges, special | others, add_special_tokens=False)


def _apply_template(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]], *, tokenize: bool) -> Any:
    try:
        return tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], add_generation_prompt=True, tokenize=tokenize, return_dict=False
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


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, AddedToken]:
    try:
        return dict(tokenizer.added_tokens_decoder)
    except NotImplementedError:  # mistral-common's, whose control tokens no text can spell
        return {}


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[frozenset[int], frozenset[int]]:
    """Added tokens that are special, and those that are not and that the chat template writes.

    Other added tokens are words like any other. A template writes spaces and line ends as text.
    """
    listed = text_control_tokens(tokenizer)
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    special, others = set(), set()
    for number, token in _added_tokens(tokenizer).items():
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
        names = [_added_tokens(tokenizer)[number].content for number in control]
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
    def unused_in(cls, turns: Sequence[Mapping[str, str]]) -> _Marks:
        """Of characters that no turn contains. Raises InputError if there are none."""
        used = set().union(*(turn["content"] for turn in turns))
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
