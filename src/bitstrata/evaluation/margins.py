"""How sure a model is where a reply turns into a tool call or a JSON answer, at each bits.

Divergence is a mean over all tokens; these few decide whether a reply can be used at all. At such a token

    margin = logit(the right token) - the largest logit of any other

which is also the difference of their log-probabilities: above 0 greedy decoding takes the right token. Kinds of tokens:

    tool call   the first at which the template's text of the call differs from that of an answer in words
    tool name   the first of the function's name
    json        the first of a reply that is a JSON object or list

What matters of a precision is what it makes of decisions that the original gets right: the median of their margins, as
a part of the original's median over the same ones, and the share that is no longer right (`flipped`). Without an
original these are all decisions. The text before the token is that of the chat, whatever the model would have written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import Chat, Mix, decision_chats, read_mix, usable_chats, write_chat
from ..errors import InputError, TextError, UsageError
from ..models import check_vocabulary, context_limit
from ..progress import Steps, note
from .perplexity import batches, padded
from .subject import Subject

KINDS = ("tool call", "tool name", "json")
IN_WORDS = "Certainly"  # an answer that is neither a call nor JSON


@dataclass(frozen=True)
class Margins:
    """Of one kind of decision at one bits.

    decisions: how many there are. right: the share of them with a margin above 0.
    decided: those that the original gets right, or all without one. median, p10, p90: quantiles of their margins, None
        where there are none.
    of_reference: the median over the original's, and flipped: the share of them that is not right here; None without an
        original.
    """

    decisions: int
    right: float
    decided: int
    median: float | None
    p10: float | None
    p90: float | None
    of_reference: float | None = None
    flipped: float | None = None


@dataclass(frozen=True)
class OnChats:
    """Margins by kind for each of the subject's `chosen`, and the original's."""

    rows: tuple[dict[str, Margins], ...]
    original: dict[str, Margins] | None


@dataclass(frozen=True)
class _Decision:
    """The tokens up to and with the one that is decided."""

    kind: str
    ids: list[int]


@dataclass(frozen=True)
class _Passage:
    """Tokens of one forward pass, and the decisions in it: the place of each token that is decided, and its kind."""

    ids: list[int]
    decided: tuple[tuple[int, str], ...]


def read_chats(name: str | Path) -> list[Chat]:
    """The chats to measure on: a file of them, or `chat`, those that are built in. Raises UsageError for a text."""
    if str(name) == "chat":
        return decision_chats()
    found = read_mix(name)
    if not isinstance(found, Mix) or len(found.sources) > 1 or not found.sources[0].chats:
        raise UsageError(f"margins are measured on chats, and {name} are none", hint="chats as .jsonl, or `chat`")
    return list(found.sources[0].chats)


def measure_margins(subject: Subject, chats: Sequence[Chat]) -> OnChats:
    """Measure at the decisions of `chats`.

    Raises TextError where there is no decision or no chat template, InputError for a tokenizer without offsets.
    """
    passages = _passages(subject, chats)
    margins: list[list[float]] = [[] for _ in subject.chosen]
    expected: list[float] = []
    groups = list(batches(passages, lambda passage: len(passage.ids)))
    kinds = [kind for group in groups for passage in group for _, kind in passage.decided]
    with torch.no_grad(), Steps("measuring margins", len(groups), "batch") as steps:
        for group in groups:
            if subject.original is not None:
                expected += _margins(subject.original, group, subject.device)
            for value, found in zip(subject.chosen, margins, strict=True):
                with subject.at(value) as model:
                    found += _margins(model, group, subject.device)
            steps.step()
    original = np.array(expected) if subject.original is not None else None
    rows = tuple(_summary(kinds, np.array(found), original) for found in margins)
    return OnChats(rows, None if original is None else _summary(kinds, original, original))


def _margins(model: PreTrainedModel, group: Sequence[_Passage], device: torch.device) -> list[float]:
    ids, _ = padded([passage.ids for passage in group], 0, device)
    places = [(row, place) for row, passage in enumerate(group) for place, _ in passage.decided]
    rows, at = torch.tensor(places, device=device).T
    logits = model(input_ids=ids, use_cache=False).logits[rows, at - 1].float()  # [decisions, vocab]
    right = ids[rows, at].unsqueeze(1)
    chosen = logits.gather(1, right)
    others = logits.scatter(1, right, -torch.inf).max(1, keepdim=True).values
    return [float(value) for value in (chosen - others).squeeze(1)]


def _summary(
    kinds: Sequence[str], margins: npt.NDArray[np.float64], original: npt.NDArray[np.float64] | None
) -> dict[str, Margins]:
    found = {}
    for kind in KINDS:
        of_kind = np.array([name == kind for name in kinds])
        if not of_kind.any():
            continue
        here = margins[of_kind]
        decided = np.ones(len(here), bool) if original is None else original[of_kind] > 0
        median, p10, p90 = np.quantile(here[decided], [0.5, 0.1, 0.9]).tolist() if decided.any() else (None,) * 3
        base = None if original is None or not decided.any() else float(np.median(original[of_kind][decided]))
        found[kind] = Margins(
            decisions=len(here),
            right=float((here > 0).mean()),
            decided=int(decided.sum()),
            median=median,
            p10=p10,
            p90=p90,
            of_reference=None if base is None or median is None else median / base,
            flipped=None if base is None else float((here[decided] <= 0).mean()),
        )
    return found


def _passages(subject: Subject, chats: Sequence[Chat]) -> list[_Passage]:
    tokenizer = subject.tokenizer
    if not tokenizer.is_fast:
        raise InputError(
            "margins need a tokenizer that says where its tokens stand", hint="put tokenizer.json beside the model"
        )
    limit = context_limit(subject.model.config)
    found = [one for chat in usable_chats(tokenizer, chats) for one in _decisions(tokenizer, chat)]
    kept = [one for one in found if limit is None or len(one.ids) <= limit]
    if len(kept) < len(found):
        note(f"{len(found) - len(kept)} of {len(found)} decisions lie beyond the model's context of {limit} tokens")
    if not kept:
        raise TextError(
            "no chat has a tool call or an answer in JSON that could be measured",
            hint="give chats whose assistant calls tools, or answers with a JSON object",
        )
    check_vocabulary((max(one.ids) for one in kept), subject.model.config, tokenizer)
    passages: list[_Passage] = []
    for one in kept:
        before = passages[-1] if passages else _Passage([], ())
        if before.ids and one.ids[: len(before.ids)] == before.ids:  # a later one of the same chat: one pass for both
            passages[-1] = _Passage(one.ids, (*before.decided, (len(one.ids) - 1, one.kind)))
        else:
            passages.append(_Passage(one.ids, ((len(one.ids) - 1, one.kind),)))
    return passages


def _decisions(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> Iterator[_Decision]:
    """Those of every assistant's turn."""
    for turn, message in enumerate(chat.messages):
        if message["role"] != "assistant" or not (message.get("tool_calls") or _is_json(message["content"])):
            continue
        text = write_chat(tokenizer, chat.until(turn + 1))
        start = _common(write_chat(tokenizer, chat.until(turn), answering=True), text)
        places: dict[int, str] = {}
        if message.get("tool_calls"):
            words = replace(chat, messages=(*chat.messages[:turn], {"role": "assistant", "content": IN_WORDS}))
            opened = max(start, _common(write_chat(tokenizer, words), text))
            places[text.find(message["tool_calls"][0]["function"]["name"], opened)] = "tool name"
            places[opened] = "tool call"
        else:
            places[text.find(message["content"].strip(), start)] = "json"
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for place, kind in sorted(places.items()):
            at = next((n for n, (_, end) in enumerate(encoded.offset_mapping) if 0 <= place < end), 0)
            if at > 0:
                yield _Decision(kind, encoded.input_ids[: at + 1])


def _common(one: str, other: str) -> int:
    """How many characters both begin with."""
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)


def _is_json(text: str) -> bool:
    if not text.strip().startswith(("{", "[")):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
