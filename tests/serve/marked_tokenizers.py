"""A model's tokenizer with other names for some of its tokens, which the model can therefore make."""

from __future__ import annotations

import json
from collections.abc import Mapping

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast


def renamed(tokenizer: PreTrainedTokenizerFast, names: Mapping[int, str], *, special: bool) -> PreTrainedTokenizerFast:
    """`tokenizer`, in whose vocabulary the tokens of `names` are called so; control tokens if they are special."""
    text = json.loads(tokenizer.backend_tokenizer.to_str())
    model = text["model"]
    taken = {word for word, number in model["vocab"].items() if number in names}
    model["vocab"] = {names.get(number, word): number for word, number in model["vocab"].items()}
    model["merges"] = [pair for pair in model["merges"] if not taken & {*pair, "".join(pair)}]
    if special:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        text["added_tokens"] += [{"id": at, "content": name, "special": True, **flags} for at, name in names.items()]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(text)),
        eos_token=tokenizer.eos_token,
        bos_token=tokenizer.bos_token,
    )
