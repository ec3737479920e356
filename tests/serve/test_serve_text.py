"""Text as it comes: nothing is sent that a later token changes, and the pieces are the whole."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bitstrata.serve.text import REPLACEMENT, Detokenizer, ReplyText, StopTexts, TokenNames

TEXTS = [
    "def area(width, height):\n    return width * height\n",
    "café, naïve, Ærøskøbing, 東京都は日本の首都です。" * 4,
    "👩‍👩‍👧‍👦 and 🇩🇰 and 𐍈𐌰𐌿",
    "a" * 200 + "é" * 100,
    "Привет, мир! " * 10,
]


def sentencepiece(vocabulary: str = "abcdefghijklmnopqrstuvwxyz ,.!()*:=\n") -> PreTrainedTokenizerFast:
    """As Llama's: words begin with U+2581, what is not in the vocabulary is bytes, decoding drops the first space."""
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581" if character == " " else character for character in vocabulary]
    tokenizer = Tokenizer(
        models.BPE({piece: index for index, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.normalizer = None
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def llama_like():
    return sentencepiece()


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text.replace(" ", "\u2581") if "<0x00>" in tokenizer.get_vocab() else text)


@pytest.fixture(params=["byte level", "byte fallback"])
def either(request, tokenizer, llama_like):
    return tokenizer if request.param == "byte level" else llama_like


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:12])
def test_the_pieces_are_the_whole(either, text):
    ids = encode(either, text)
    assert either.decode(ids, skip_special_tokens=True) == text, "the tokenizer of this test is broken"
    detokenizer = Detokenizer(either)
    pieces = [detokenizer.push(token) for token in ids]
    assert "".join(pieces) + detokenizer.flush() == text
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces[: len(ids) // 2]), "text comes as it is made, not at the end"
    assert len(detokenizer._window) <= 64, "what one token costs does not grow with the reply"


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:12])
def test_a_reply_continues_its_prompt(either, text):
    """Prompt and reply together are the text: no space is lost between them, no character spoiled."""
    ids = encode(either, text)
    for cut in range(1, len(ids)):
        prompt = either.decode(ids[:cut], skip_special_tokens=True)
        if prompt.endswith(REPLACEMENT):
            continue  # only a prompt of tokens can end within a character; then its last bytes may be lost
        detokenizer = Detokenizer(either, ids[:cut])
        reply = "".join(detokenizer.push(token) for token in ids[cut:]) + detokenizer.flush()
        assert prompt + reply == text, cut


def test_special_tokens_are_not_text(llama_like):
    detokenizer = Detokenizer(llama_like)
    ids = [0, *encode(llama_like, "a b"), 1, *encode(llama_like, " c")]
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == "a b c"


@pytest.mark.parametrize("seed", range(5))
def test_bytes_that_are_no_text_do_not_stop_the_text(either, seed):
    """A model that makes nonsense: text after it is right, the window stays small, nothing waits for ever."""
    chance = random.Random(seed)
    noise = [chance.randrange(3, 200) for _ in range(300)]
    end = encode(either, "the end")
    detokenizer = Detokenizer(either)
    text = "".join(map(detokenizer.push, noise + end)) + detokenizer.flush()
    assert text.endswith("the end")
    assert len(detokenizer._window) <= 64
    waiting = Detokenizer(either)
    broken = either.convert_tokens_to_ids("<0xF0>" if either.convert_tokens_to_ids("<0xF0>") else "ð")
    assert "".join(waiting.push(broken) for _ in range(20)), "invalid bytes are given up for replacement characters"


@given(
    st.text("abx", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 5), max_size=30),
)
def test_a_text_is_cut_before_the_first_stop_whatever_the_pieces(text, stops, sizes):
    places = [text.index(stop) for stop in stops if stop in text]
    whole = text[: min(places)] if places else text
    cutter, given_out, start = StopTexts(stops), "", 0
    for size in [*sizes, len(text)]:
        piece = cutter.push(text[start : start + size])
        start += size
        given_out += piece
        assert whole.startswith(given_out), "what was given can no longer be taken back"
        seen = text[: min(start, len(text))]
        if not cutter.found:  # no more is held back than could begin a stop text
            assert len(seen) - len(given_out) < max(map(len, stops))
    assert given_out + cutter.flush() == whole
    assert cutter.found == bool(places)


def test_a_stop_text_may_end_in_the_middle_of_a_token(tokenizer):
    ids = tokenizer.encode("def area(width, height):\n    return", add_special_tokens=False)
    reply = ReplyText(tokenizer, (), ["width, hei"])
    pieces = [reply.push(token) for token in ids]
    assert "".join(pieces) + reply.flush() == "def area("
    assert reply.stopped


def test_names_of_tokens_are_their_bytes(either):
    names = TokenNames(either)
    for text in TEXTS:
        shown = [names.of(token) for token in encode(either, text)]
        assert b"".join(raw for _, raw in shown) == text.encode()
        for name, raw in shown:
            assert name == raw.decode() if not name.startswith("bytes:") else name.count("\\x") == len(raw)
    assert names.of(either.eos_token_id)[0] == either.eos_token
