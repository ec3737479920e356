"""Windows of tokens: the prefix first, exact lengths, nothing twice, nothing shared between learning and checking."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CHARACTERS, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from bitstrata.calibration import calibration_windows, evaluation_windows, given_tokens
from bitstrata.errors import TextError, UsageError

TOKENIZER = tiny_tokenizer()
# all three define a BOS; what they put around a text differs
TOKENIZERS = {
    (): tiny_tokenizer(prefix=""),
    (0,): TOKENIZER,
    (2, 0): tiny_tokenizer(prefix="<unk> <s>", suffix="</s>"),
}
LETTERS = [character for character in CHARACTERS[:61] if not character.isspace()]
PREFIXES = st.sampled_from(sorted(TOKENIZERS))


def documents(seed: int, lengths: list[int]) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(LETTERS, k=length)) for length in lengths]


def tokens(document: str) -> list[int]:
    return TOKENIZER.encode(document, add_special_tokens=False)


lengths = st.lists(st.integers(1, 70), min_size=1, max_size=5)


@given(st.integers(0, 10**6), lengths, st.integers(3, 40), PREFIXES)
def test_evaluation_windows_cover_each_document_once_and_never_cross(
    seed: int, sizes: list[int], seq_len: int, prefix: tuple[int, ...]
) -> None:
    tokenizer, texts = TOKENIZERS[prefix], documents(seed, sizes)
    windows = list(evaluation_windows(tokenizer, texts, seq_len))
    step, pieces = seq_len - len(prefix), []
    for text in texts:
        stream = tokens(text)
        pieces += [stream[start : start + step] for start in range(0, len(stream), step)]
    if prefix:
        assert windows == [[*prefix, *piece] for piece in pieces]
    else:  # a single token predicts nothing without one before it
        assert windows == [piece for piece in pieces if len(piece) > 1]
    assert given_tokens(tokenizer) == max(1, len(prefix))


@given(st.integers(0, 10**6), st.integers(1, 50), PREFIXES)
def test_a_short_document_is_the_tokenizers_own_text(seed: int, size: int, prefix: tuple[int, ...]) -> None:
    """One window starts as `tokenizer(text)` does; EOS, where it appends one, is left out."""
    (text,) = documents(seed, [size])
    windows = list(evaluation_windows(TOKENIZERS[prefix], [text], 60))
    whole = TOKENIZERS[prefix](text).input_ids
    assert windows == [whole[: size + len(prefix)]] or (size == 1 and prefix == () and not windows)


@given(st.integers(0, 10**6), lengths, st.integers(3, 40), st.integers(1, 200), PREFIXES)
def test_max_tokens_is_exact(
    seed: int, sizes: list[int], seq_len: int, max_tokens: int, prefix: tuple[int, ...]
) -> None:
    tokenizer, texts = TOKENIZERS[prefix], documents(seed, sizes)
    read = max(1, len(prefix))
    everything = list(evaluation_windows(tokenizer, texts, seq_len))
    limited = list(evaluation_windows(tokenizer, texts, seq_len, max_tokens))
    predicted = sum(len(window) - read for window in limited)
    assert predicted == min(max_tokens, sum(len(window) - read for window in everything))
    assert all(window == whole[: len(window)] for window, whole in zip(limited, everything, strict=False))
    assert all(window == whole for window, whole in zip(limited[:-1], everything, strict=False)), "only the last is cut"


@pytest.mark.parametrize(("prefix", "least"), [((), 2), ((0,), 2), ((2, 0), 3)])
def test_a_window_must_hold_a_token_to_predict(prefix: tuple[int, ...], least: int) -> None:
    tokenizer = TOKENIZERS[prefix]
    settings = {"num_samples": 1, "num_heldout": 1, "seed": 0}
    for seq_len in (least - 1, 0, -5):
        with pytest.raises(UsageError, match=f"at least {least}"):
            list(evaluation_windows(tokenizer, ["words"], seq_len))
        with pytest.raises(UsageError, match=f"at least {least}"):
            calibration_windows(tokenizer, ["words"], seq_len=seq_len, **settings)
    assert list(evaluation_windows(tokenizer, ["words"], least))
    assert calibration_windows(tokenizer, ["words"], seq_len=least, **settings).calibration.shape == (1, least)


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 20), st.integers(3, 24), PREFIXES)
def test_calibration_windows_are_whole_disjoint_and_begin_with_the_prefix(
    seed: int, num_samples: int, num_heldout: int, seq_len: int, prefix: tuple[int, ...]
) -> None:
    """Tokens of the text are made unique by counting, so that a window tells where it was cut."""
    special = list(range(1000, 1000 + len(prefix)))

    class Counting:
        next = 1

        def encode(self, document: str, add_special_tokens: bool = True, **_: object) -> list[int]:
            start, Counting.next = Counting.next, Counting.next + len(document)
            if len(document) == 1:  # a question what is put around a text
                return [*special, 0] if add_special_tokens else [0]
            return list(range(start, Counting.next))

    texts = documents(seed, [90, 2, 60, 48])
    windows = calibration_windows(
        Counting(),  # type: ignore[arg-type]
        texts,
        num_samples=num_samples,
        seq_len=seq_len,
        num_heldout=num_heldout,
        seed=seed,
    )
    step = seq_len - len(prefix)
    count = (200 + 4 * len(prefix)) // step
    heldout = min(num_heldout, max(1, count // 8))
    assert tuple(windows.heldout.shape) == (heldout, seq_len)
    assert tuple(windows.calibration.shape) == (min(num_samples, count - heldout), seq_len)
    together = torch.cat([windows.calibration, windows.heldout])
    assert together[:, : len(prefix)].tolist() == [special] * len(together)
    body = together[:, len(prefix) :]
    real = body[body < 1000]  # the prefix stands before each document too
    assert len(real.unique()) == len(real), "a token was used twice"


def test_windows_are_chosen_by_the_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = documents(0, [400, 400])

    def draw(seed: int) -> torch.Tensor:
        windows = calibration_windows(tokenizer, texts, num_samples=5, seq_len=16, num_heldout=2, seed=seed)
        return torch.cat([windows.calibration, windows.heldout])

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    torch.manual_seed(99)
    assert torch.equal(draw(0), draw(0)), "the global random state matters"


def test_more_samples_only_add_windows(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = documents(0, [800])
    few, many = (
        calibration_windows(tokenizer, texts, num_samples=n, seq_len=16, num_heldout=3, seed=0) for n in (4, 9)
    )
    assert torch.equal(few.calibration, many.calibration[:4])
    assert torch.equal(few.heldout, many.heldout)


def test_a_text_for_two_windows_is_enough_and_one_token_less_is_not(tokenizer: PreTrainedTokenizerFast) -> None:
    def windows(length: int) -> int:
        found = calibration_windows(tokenizer, documents(0, [length]), num_samples=8, seq_len=16, num_heldout=8, seed=0)
        return len(found.calibration) + len(found.heldout)

    assert windows(29) == 2  # with the BOS before the document 30 tokens, 15 in each window behind its own BOS
    with pytest.raises(TextError, match="29 tokens; two windows of 16") as caught:
        windows(28)
    assert "--seq-len" in (caught.value.hint or "")
