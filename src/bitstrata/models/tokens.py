"""Texts -> tokens, as the tokenizer itself makes them.

A text starts with what `tokenizer(text)` puts in front of it: BOS where the tokenizer adds one, other tokens (GLM's
`[gMASK]<sop>`) where it has those, nothing where it adds nothing, whatever `bos_token_id` says. What it puts behind
a text (EOS, with add_eos_token) is left out: what is to go on must not begin with its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import AddedToken, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..checkpoint.reader import regular_file
from ..errors import BitstrataError, InputError, first_line

PROBES = ("a", "0", " ", "\n", "\N{CJK UNIFIED IDEOGRAPH-4E00}")


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


class Stops:
    """Texts that end a reply, special tokens in them included.

    Decoded text does not show special tokens. Those that a stop text spells are shown as half surrogates, which no
    decoded text contains: `marks` has the character of each, `texts` the stop texts as given and with the marks.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> None:
        given = tuple(texts)
        special = {token.content: number for number, token in added_tokens(tokenizer).items() if token.special}
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


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, AddedToken]:
    """The tokens that were added to the tokenizer's vocabulary, by number."""
    try:
        return dict(tokenizer.added_tokens_decoder)
    except NotImplementedError:  # mistral-common's, whose control tokens no text can spell
        return {}
