"""`suffix`: each family's prompt, as it is published, and replies that end at a mark, which is no part of them."""

from __future__ import annotations

import copy

import pytest
from http_calls import COMPLETIONS, served
from marked_tokenizers import renamed
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bitstrata.errors import InputError
from bitstrata.models import Infilling
from bitstrata.serve.app import create_app
from bitstrata.serve.settings import Settings

BEGIN, HOLE, END = (f"<\uff5cfim\u2581{name}\uff5c>" for name in ("begin", "hole", "end"))
PUBLISHED = {
    "qwen": (["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|file_sep|>"], "{0}P{2}S{1}"),
    "starcoder": (["<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<file_sep>"], "{0}P{2}S{1}"),
    "santacoder": (["<fim-prefix>", "<fim-middle>", "<fim-suffix>", "<fim-pad>"], "{0}P{2}S{1}"),
    "deepseek": ([BEGIN, HOLE, END], "{0}P{1}S{2}"),
    "codestral": (["[PREFIX]", "[SUFFIX]"], "{1}S{0}P"),
}


def with_marks(tokenizer, marks, *, special=True):
    other = copy.deepcopy(tokenizer)
    other.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in marks])
    return other


@pytest.mark.parametrize("family", PUBLISHED)
@pytest.mark.parametrize("special", [True, False])
def test_prompts_are_as_published(tokenizer, family, special):
    marks, form = PUBLISHED[family]
    marked = with_marks(tokenizer, marks, special=special)
    prefix, suffix = "def area(w, h):\n    ", "\n    return  size  \n"
    fill = Infilling(marked)
    pieces = {
        "P": marked.encode(prefix, add_special_tokens=False),
        "S": marked.encode(suffix, add_special_tokens=False),
    }
    expected = []
    for piece in _split(form):
        expected += pieces[piece] if piece in pieces else [marked.convert_tokens_to_ids(marks[int(piece[1])])]
    assert fill.prompt(prefix, suffix) == expected
    assert fill.prompt(pieces["P"], suffix) == expected
    assert set(fill.ends) - {marked.eos_token_id} == set(marked.convert_tokens_to_ids(marks))


def _split(form):
    return form.replace("{", " {").replace("}", "} ").replace("P", " P ").replace("S", " S ").split()


def sentencepiece_like():
    """Puts BOS and a space before every text, as CodeLlama's does."""
    words = ["<unk>", "<s>", "</s>", "\u2581", "\n", *"abcdefghijklmnopqrstuvwxyz():=", "<EOT>"]
    inner = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return with_marks(made, [f"\u2581<{name}>" for name in ("PRE", "MID", "SUF", "EOT")])


def test_a_suffix_does_not_begin_with_the_space_that_its_tokenizer_puts_before_texts():
    tokenizer = sentencepiece_like()
    pre, mid, suf, eot = tokenizer.convert_tokens_to_ids([f"\u2581<{name}>" for name in ("PRE", "MID", "SUF", "EOT")])
    fill = Infilling(tokenizer)
    named = [tokenizer.convert_ids_to_tokens(token) for token in fill.prompt("def", "b=a")]
    assert named == ["<s>", "\u2581<PRE>", "\u2581", "d", "e", "f", "\u2581<SUF>", "b", "=", "a", "\u2581<MID>"]
    assert fill.prompt("def", "b=a", add_special_tokens=False) == fill.prompt("def", "b=a")[1:]
    assert fill.prompt(tokenizer("def").input_ids, "b=a") == fill.prompt("def", "b=a"), "BOS stays in front"
    assert fill.prompt(tokenizer.encode("def", add_special_tokens=False), "b=a") == fill.prompt("def", "b=a")[1:]
    assert set(fill.ends) == {pre, mid, suf, eot}


def test_a_tokenizer_without_marks_is_refused_by_name(tokenizer):
    with pytest.raises(InputError, match="no marks") as told:
        Infilling(with_marks(tokenizer, ["<fim_prefix>", "<fim_suffix>"]))
    assert "StarCoder" in str(told.value.hint)


@pytest.fixture(scope="module")
def marks(tokenizer):
    """Names of tokens that the model has already, so that it can make them."""
    return {"prefix": 300, "suffix": 301, "middle": 302}


@pytest.fixture(scope="module")
def filling(engine, tokenizer, marks):
    """A server whose tokenizer calls three tokens of the model's by the names of StarCoder's marks."""
    own = renamed(tokenizer, {number: f"<fim_{name}>" for name, number in marks.items()}, special=False)
    with served(create_app(engine, own, Settings("small")), engine) as running:
        yield running, own


def test_a_reply_ends_at_a_mark_which_is_not_in_its_text(filling, marks):
    server, tokenizer = filling
    body = {"prompt": "def area(w, h):\n    ", "suffix": "\n    return size", "temperature": 0, "max_tokens": 12}
    free = server.post(COMPLETIONS, {**body, "return_token_ids": True}).json["choices"][0]
    again = {
        "prompt": Infilling(tokenizer).prompt(body["prompt"], body["suffix"]),
        "temperature": 0,
        "max_tokens": 12,
        "return_token_ids": True,
    }
    assert server.post(COMPLETIONS, again).json["choices"][0]["token_ids"] == free["token_ids"]
    for mark in marks.values():
        ended = server.post(COMPLETIONS, {**body, "logit_bias": {str(mark): 100}}).json
        assert ended["choices"][0]["text"] == ""
        assert ended["choices"][0]["finish_reason"] == "stop"
        assert ended["usage"]["completion_tokens"] == 1
    several = server.post(COMPLETIONS, {**body, "prompt": [body["prompt"], "x ="]}).json["choices"]
    assert several[0]["text"] == free["text"]
    assert several[1]["text"] != free["text"]
    plain = server.post(COMPLETIONS, {**body, "suffix": ""}).json["choices"][0]["text"]
    assert plain != free["text"], "the suffix is read"
