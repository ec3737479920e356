"""Loss, and distance from the original, at each bits, streamed over the windows of a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration import evaluation_windows, given_tokens
from ..errors import TextError
from ..metrics import Metrics, Tally
from ..models import check_vocabulary, context_limit
from ..progress import Steps, note
from .subject import Subject

T = TypeVar("T")
TOKENS_PER_BATCH = 2048
DEFAULT_SEQ_LEN = {"all": 2048, "second-half": 512}


@dataclass(frozen=True)
class OnText:
    """What a text gave: a row for each of the subject's `chosen`, the original's, and the length of the windows."""

    rows: tuple[Metrics, ...]
    original: Metrics | None
    seq_len: int


def measure_text(
    subject: Subject, documents: Sequence[str], *, seq_len: int | None, max_tokens: int | None, scored: str
) -> OnText:
    """Measure on the windows of a text; of each, `scored` tokens are predicted (calibration/data.py).

    Raises TextError for a text without a window, InputError for tokens beyond the model's vocabulary.
    """
    length = context_length(subject.model, seq_len, DEFAULT_SEQ_LEN[scored])
    groups = list(batches(evaluation_windows(subject.tokenizer, documents, length, max_tokens, scored), len))
    given = given_tokens(subject.tokenizer, length, scored)
    tokens = (max(window) for group in groups for window in group)
    check_vocabulary(tokens, subject.model.config, subject.tokenizer)
    if not groups:
        least = "two tokens or more" if scored == "all" else f"{length} tokens"
        raise TextError(f"the text has no window of {least}", hint="give a longer text or a smaller --seq-len")
    tallies, baseline = [Tally() for _ in subject.chosen], Tally()
    with torch.no_grad(), Steps("evaluating", len(groups), "batch") as steps:
        for windows in groups:
            ids, predicted = padded(windows, given, subject.device)
            targets, expected = ids[predicted], None
            if subject.original is not None:
                expected = _logits(subject.original, ids, predicted)
                baseline.add(expected, targets)
            for value, tally in zip(subject.chosen, tallies, strict=True):
                with subject.at(value) as model:
                    tally.add(_logits(model, ids, predicted), targets, expected)
            steps.step()
    original = None if subject.original is None else baseline.result()
    return OnText(tuple(tally.result() for tally in tallies), original, length)


def context_length(model: PreTrainedModel, seq_len: int | None, usual: int) -> int:
    """`seq_len` (or `usual`), lowered to the model's context with a note."""
    limit = context_limit(model.config)
    wanted = usual if seq_len is None else seq_len
    if limit is None or wanted <= limit:
        return wanted
    if seq_len is not None:
        note(f"seq-len lowered from {seq_len} to {limit}, the model's context")
    return int(limit)


def batches(items: Iterable[T], length: Callable[[T], int]) -> Iterator[list[T]]:
    """Items of similar length in tokens together, at most TOKENS_PER_BATCH tokens each, padding counted."""
    pending: list[T] = []
    for item in sorted(items, key=length, reverse=True):
        if pending and length(pending[0]) * (len(pending) + 1) > TOKENS_PER_BATCH:
            yield pending
            pending = []
        pending.append(item)
    if pending:
        yield pending


def padded(windows: list[list[int]], given: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids int64 [b, S], padded on the right with 0, and which of them are to be predicted: bool [b, S].

    given: tokens at the start of each window that are not.
    """
    longest = max(map(len, windows))
    ids = torch.zeros(len(windows), longest, dtype=torch.int64)
    predicted = torch.zeros(len(windows), longest, dtype=torch.bool)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = torch.tensor(window)
        predicted[row, given : len(window)] = True
    return ids.to(device), predicted.to(device)


def _logits(model: PreTrainedModel, ids: Tensor, predicted: Tensor) -> Tensor:
    """Logits [s, vocab] from which the tokens marked in `predicted` are predicted.

    Padding is on the right and attention is causal, so real positions never see it.
    """
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[:, :-1][predicted[:, 1:]]
