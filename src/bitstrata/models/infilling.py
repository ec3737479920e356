"""Fill in the middle: a text that goes between a prefix and a suffix, for models whose vocabulary has marks for it.

    PRE prefix SUF suffix MID -> middle            SUF suffix PRE prefix -> middle   (Codestral)

Which marks a family has is published with it; the tokenizer is asked for each by name. What ends a middle is the end of
a sequence, one of the marks, or one of the family's other control tokens, such as that of the next file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from .tokens import encode_body, text_prefix

ANCHOR = "\n"


@dataclass(frozen=True)
class _Marks:
    """Names in the vocabulary. middle: "" where the prefix comes last and the model goes on with it.

    loses_space: the tokenizer puts a space before every text, and the suffix is to have none.
    """

    prefix: str
    suffix: str
    middle: str
    ends: tuple[str, ...] = ()
    loses_space: bool = False


_FILE_ENDS = ("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>", "<|im_end|>")
FAMILIES = {
    "Qwen-Coder, CodeGemma": _Marks("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", _FILE_ENDS),
    "StarCoder, Granite": _Marks(
        "<fim_prefix>", "<fim_suffix>", "<fim_middle>", ("<|endoftext|>", "<fim_pad>", "<file_sep>", "<repo_name>")
    ),
    "SantaCoder": _Marks("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ("<|endoftext|>", "<fim-pad>")),
    "CodeLlama": _Marks("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", ("\u2581<EOT>",), loses_space=True),
    "DeepSeek-Coder": _Marks(
        "<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"
    ),
    "Codestral": _Marks("[PREFIX]", "[SUFFIX]", ""),
}


class Infilling:
    """How the model of `tokenizer` is asked for a middle. ends: tokens that end one.

    Raises InputError for a tokenizer without such marks.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        known = tokenizer.get_vocab()
        for marks in FAMILIES.values():
            names = [name for name in (marks.prefix, marks.suffix, marks.middle) if name]
            if all(name in known for name in names):
                break
        else:
            raise InputError(
                "this model's vocabulary has no marks for a text between two others",
                hint=f"the marks that are known are those of {', '.join(FAMILIES)}",
            )
        self._tokenizer, self._marks, self._known = tokenizer, marks, known
        self.ends = tuple(sorted({known[name] for name in (*names, *marks.ends) if name in known}))

    def prompt(self, prefix: str | Sequence[int], suffix: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens after which the middle comes.

        Args:
            prefix: text, or its tokens.
            add_special_tokens: False leaves out what the tokenizer puts in front of a text. Tokens begin with it only
                where they bring it themselves.

        Raises InputError for half a surrogate pair.
        """
        marks, known, front = self._marks, self._known, text_prefix(self._tokenizer)
        if isinstance(prefix, str):
            body, front = encode_body(self._tokenizer, prefix), front if add_special_tokens else []
        else:
            front = front if list(prefix[: len(front)]) == front else []
            body = list(prefix[len(front) :])
        before = [*front, known[marks.prefix], *body]
        after = [known[marks.suffix], *self._suffix(suffix)]
        if not marks.middle:
            return [*front, *after, *before[len(front) :]]
        return [*before, *after, known[marks.middle]]

    def _suffix(self, text: str) -> list[int]:
        if not self._marks.loses_space:
            return encode_body(self._tokenizer, text)
        anchor, tokens = (encode_body(self._tokenizer, one) for one in (ANCHOR, ANCHOR + text))
        return tokens[len(anchor) :] if tokens[: len(anchor)] == anchor else encode_body(self._tokenizer, text)
