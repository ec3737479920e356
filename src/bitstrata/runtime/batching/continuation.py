"""A text in the making: what of it is in the cache, how its next token is picked, and what ends it.

The same for a request of an engine and for one text of a session, so that both make the same tokens of the same logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import BitstrataError
from ...models import Stops
from ...nn import Assignment
from ...nn.bits import Choice
from .alone import Passes
from .attention import Span
from .masks import Fitting, Mask
from .packing import Segment
from .request import Token
from .sampling import Sampler, choose, scored

GROWTH = 256  # tokens
STOP_TOKENS = 4  # a character may take this many tokens, so a stop text of n lies within the last 4 n and a few


@dataclass(eq=False)
class Continuation:
    """`tokens`, the prompt and then the new ones; the first `past` of them are in the cache, in the range `place`.

    most: new tokens it may make. ends: tokens that end it; stops: texts that do. rules: (tokens int64 [1, n], logits
    [1, V]) -> logits to pick from, if they are others. mask: what the reply is held to, after the rules. scores: how
    many likely tokens to note at each place of the prompt, which is then computed as a whole; None for no
    log-probabilities of it.
    """

    tokens: list[int]
    most: int
    sampler: Sampler
    ends: frozenset[int] = frozenset()
    stops: Stops | None = None
    rules: Callable[[Tensor, Tensor], Tensor] | None = None
    mask: Mask | None = None
    place: range | None = None
    written: list[Choice] = field(default_factory=list)  # at what each token that is in the cache was computed
    reused: int = 0  # of these, the ones that were there before
    new: list[int] = field(default_factory=list)
    scores: int | None = None
    scored: list[Token] = field(default_factory=list)  # of the prompt, so far

    @property
    def scores_next(self) -> bool:
        """Whether what is fed next has to be scored."""
        return self.scores is not None and not self.new

    @property
    def past(self) -> int:
        return len(self.written)

    @property
    def room(self) -> int:
        """Tokens of the cache that it needs to start, or to go on for a while."""
        # the last new token is never an input
        whole = len(self.tokens) - len(self.new) + self.most - 1
        return min(whole, len(self.tokens) + GROWTH)

    def lacks_room(self, drafts: int = 0) -> bool:
        """Whether what is to be fed next, and so many drafts after it, do not fit into its range."""
        return self.place is None or len(self.tokens) + drafts > len(self.place)

    def segment(self, owner: int, bits: Assignment) -> Segment:
        """What is to be fed next, as `packing` takes it."""
        return Segment(owner, self.past, len(self.tokens) - self.past, bits, every=self.scores_next)

    def add(self, token: int) -> None:
        self.tokens.append(token)
        self.new.append(token)

    def ended(self) -> str | None:
        """Why the newest token was the last: "stop" or "length"; None if it goes on.

        Raises what the tokenizer does, and what the mask does.
        """
        if self.new[-1] in self.ends or (self.stops is not None and self._finds(self.stops)):
            return "stop"
        if self.mask is not None and self.mask.is_over(self.tokens):
            return "stop"
        return "length" if len(self.new) >= self.most else None

    def _finds(self, stops: Stops) -> bool:
        return stops.found_in(self.new[-STOP_TOKENS * (max(map(len, stops.texts)) + 2) :])


def advance(forward: Passes, items: Sequence[Continuation], batch: Sequence[Segment]) -> Tensor:
    """Feed batch[i] of items[i] in one pass: logits [segments, V] float32 after the last token of each."""
    tokens, spans = [], []
    for item, part in zip(items, batch, strict=True):
        assert item.place is not None
        tokens.append(item.tokens[part.past : part.past + part.length])
        spans.append(Span(item.place.start, part.past, part.length))
    bits = [part.bits for part in batch]
    wrote = [one.choices[0] for one in bits]
    logits = forward.run(tokens, spans, bits, [part.every for part in batch])
    for item, part, choice in zip(items, batch, wrote, strict=True):
        # a resize may have come before the pass or after it; nobody asks for no layers
        item.written += [choice if part.bits.choices[0] is choice else ()] * part.length
    if not any(part.every for part in batch):
        return logits
    rows = logits.split([part.length if part.every else 1 for part in batch])  # [length or 1, V] each
    for item, part, own in zip(items, batch, rows, strict=True):
        if part.every:
            _score(item, part.past, own)
    return torch.stack([own[-1] for own in rows])


def _score(item: Continuation, past: int, logits: Tensor) -> None:
    """Note how likely the tokens were that follow those of logits [n, V], the first after `past` tokens."""
    assert item.scores is not None
    if not item.scored:
        item.scored.append(Token(item.tokens[0]))
    following = item.tokens[past + 1 : past + 1 + len(logits)]
    item.scored += scored(logits[: len(following)], following, item.scores)


def pick(logits: Tensor, items: Sequence[Continuation]) -> list[Token | BitstrataError]:
    """The next token of each of `items` from its row of logits [items, V], not yet added; or why there is none.

    Rows that rules or a mask change are changed in place.
    """
    among, failed = _admitted(logits, items)
    own: dict[int, Tensor] = {}
    for row, item in enumerate(items):
        if (item.rules is None and item.mask is None) or row in among or row in failed:
            continue
        try:
            fit = None if item.mask is None else item.mask.fitting(item.tokens, logits.shape[-1])
        except BitstrataError as error:  # of this request alone
            failed[row] = error
            continue
        if item.sampler.logprobs is not None:
            own[row] = logits[row].clone()
        if item.rules is not None:
            logits[row] = _by_rules(logits[row : row + 1], item, item.tokens, fit)[0]
        if fit is not None and (few := fit.few(logits.device)) is not None:
            among[row] = few
        elif fit is not None:
            fit.apply(logits[row : row + 1])
    chosen = choose(logits, [item.sampler for item in items], own, among)
    return [failed.get(row, token) for row, token in enumerate(chosen)]


def _admitted(logits: Tensor, items: Sequence[Continuation]) -> tuple[dict[int, Tensor], dict[int, BitstrataError]]:
    """Of greedy rows whose likeliest token their masks admit anyway, that token [1]; and what went wrong with others.

    Such a row needs no mask, which takes longer than all else here.
    """
    rows = [
        row
        for row, item in enumerate(items)
        if item.mask is not None and item.rules is None and item.sampler.temperature == 0
    ]
    found: dict[int, Tensor] = {}
    failed: dict[int, BitstrataError] = {}
    if not rows:
        return found, failed
    likeliest = (logits if len(rows) == len(items) else logits[rows]).argmax(dim=-1)
    for row, token in zip(rows, likeliest.split(1), strict=True):
        mask = items[row].mask
        try:
            if mask is not None and mask.admits(items[row].tokens, int(token)):
                found[row] = token
        except BitstrataError as error:
            failed[row] = error
    return found, failed


def ruled(logits: Tensor, item: Continuation, tokens: Sequence[int]) -> Tensor:
    """Logits [1, V] after `tokens` as the rules of `item` want them, and its mask, which has the last word.

    Raises CheckError as Mask.
    """
    fit = None if item.mask is None else item.mask.fitting(tokens, logits.shape[-1])
    wanted = logits if item.rules is None else _by_rules(logits, item, tokens, fit)
    return wanted if fit is None else fit.apply(wanted.clone())


def _by_rules(logits: Tensor, item: Continuation, tokens: Sequence[int], fit: Fitting | None) -> Tensor:
    """Logits [1, V] after `tokens` as the rules of `item` want them, which must leave something of what fits."""
    assert item.rules is not None
    wanted = item.rules(torch.tensor([tokens], device=logits.device), logits)
    return wanted if fit is None or fit.leaves(wanted) else logits
