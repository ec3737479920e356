"""Windows of tokens: BOS first, exact lengths, nothing twice, nothing shared between learning and checking."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CHARACTERS, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from bitstrata.calibrate import calibration_windows, evaluation_windows
from bitstrata.errors import TextError, UsageError

TOKENIZER = tiny_tokenizer()
BOS = TOKENIZER.bos_token_id
LETTERS = [character for character in CHARACTERS[:61] if not character.isspace()]


def without_bos() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    assert tokenizer.bos_token_id is None
    return tokenizer


def documents(seed: int, lengths: list[int]) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(LETTERS, k=length)) for length in lengths]


def tokens(document: str) -> list[int]:
    return TOKENIZER.encode(document, add_special_tokens=False)


lengths = st.lists(st.integers(1, 70), min_size=1, max_size=5)


@given(st.integers(0, 10**6), lengths, st.integers(2, 40), st.booleans())
def test_evaluation_windows_cover_each_document_once_and_never_cross(
    seed: int, sizes: list[int], seq_len: int, has_bos: bool
) -> None:
    texts = documents(seed, sizes)
    windows = list(evaluation_windows(TOKENIZER if has_bos else without_bos(), texts, seq_len))
    pieces = []
    for text in texts:
        step = seq_len - has_bos
        stream = tokens(text)
        pieces += [stream[start : start + step] for start in range(0, len(stream), step)]
    if has_bos:
        assert all(window[0] == BOS for window in windows)
        assert [window[1:] for window in windows] == pieces
    else:  # a single token predicts nothing without a BOS before it
        assert windows == [piece for piece in pieces if len(piece) > 1]
    assert all(2 <= len(window) <= seq_len for window in windows)


@given(st.integers(0, 10**6), lengths, st.integers(2, 40), st.integers(1, 200))
def test_max_tokens_is_exact(seed: int, sizes: list[int], seq_len: int, max_tokens: int) -> None:
    texts = documents(seed, sizes)
    everything = list(evaluation_windows(TOKENIZER, texts, seq_len))
    limited = list(evaluation_windows(TOKENIZER, texts, seq_len, max_tokens))
    predicted = sum(len(window) - 1 for window in limited)
    assert predicted == min(max_tokens, sum(len(window) - 1 for window in everything))
    assert all(window == whole[: len(window)] for window, whole in zip(limited, everything, strict=False))
    assert all(window == whole for window, whole in zip(limited[:-1], everything, strict=False)), "only the last is cut"


def test_a_window_must_hold_two_tokens() -> None:
    for seq_len in (1, 0, -5):
        with pytest.raises(UsageError, match="at least 2"):
            list(evaluation_windows(TOKENIZER, ["words"], seq_len))


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 20), st.integers(2, 24), st.booleans())
def test_calibration_windows_are_whole_disjoint_and_begin_with_bos(
    seed: int, num_samples: int, num_heldout: int, seq_len: int, has_bos: bool
) -> None:
    """Tokens are made unique by counting, so that a window tells where it was cut."""

    class Counting:
        bos_token_id = 0 if has_bos else None

        def __init__(self) -> None:
            self.next = 1

        def encode(self, document: str, **kwargs: object) -> list[int]:
            start, self.next = self.next, self.next + len(document)
            return list(range(start, self.next))

    texts = documents(seed, [90, 1, 60, 49])
    windows = calibration_windows(
        Counting(),
        texts,
        num_samples=num_samples,
        seq_len=seq_len,
        num_heldout=num_heldout,
        seed=seed,  # type: ignore[arg-type]
    )
    step = seq_len - has_bos
    count = (200 + 4 * has_bos) // step
    heldout = min(num_heldout, max(1, count // 8))
    assert tuple(windows.heldout.shape) == (heldout, seq_len)
    assert tuple(windows.calibration.shape) == (min(num_samples, count - heldout), seq_len)
    together = torch.cat([windows.calibration, windows.heldout])
    if has_bos:
        assert bool((together[:, 0] == 0).all())
    body = together[:, 1:] if has_bos else together
    real = body[body > 0]  # a BOS stands before each document too
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


def test_a_window_must_have_room_beside_its_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match="at least 2"):
        calibration_windows(tokenizer, ["words"], num_samples=1, seq_len=1, num_heldout=1, seed=0)
