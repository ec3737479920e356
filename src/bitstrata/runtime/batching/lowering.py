"""At what bits the next token of a text is computed: what a policy says of what it may see of the text.

The same for a request of an engine and for one text of a session.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...errors import UsageError
from ...nn import Assignment, BitsState
from ..passages import PassageReader, ReplyReader
from ..policy import Passage, Policy, RequestView
from .continuation import Continuation
from .sampling import normalised_entropy


class Lowerings:
    """Makes the Lowering of each text that `policy` may lower, for one model; from any thread.

    Raises UsageError for a policy that reads texts, without a tokenizer.
    """

    def __init__(self, policy: Policy, state: BitsState, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.policy, self._state = policy, state
        self._reader: PassageReader | None = None
        if policy.wants_passage:
            if tokenizer is None:
                raise UsageError(f"policy {policy.name} reads what the model writes", hint="give the model's tokenizer")
            self._reader = PassageReader(tokenizer)

    def of(self, prompt: Sequence[int], min_bits: int | None) -> Lowering:
        """For a text that begins with `prompt`, down to `min_bits`, or not at all."""
        reader = None if self._reader is None or min_bits is None else self._reader.begin(prompt)
        return Lowering(self.policy, self._state, min_bits, reader)


class Lowering:
    """Of one text. What it saw of the text is remembered."""

    def __init__(
        self, policy: Policy, state: BitsState, min_bits: int | None, reader: ReplyReader | None = None
    ) -> None:
        self._policy, self._state, self._min_bits, self._reader = policy, state, min_bits, reader
        self._steps = policy.start()
        self._before, self._rises = 0, False  # the bits of the last token, and whether the next one's are more
        self.entropy: float | None = None  # of the last distribution, if the policy wants it

    def view(self, item: Continuation, asked: Assignment) -> RequestView | None:
        """What the policy sees of `item` at bits `asked`; None for one on a plan, which none lowers."""
        if not isinstance(asked.given, int):
            return None
        supported = self._state.supported
        if not item.new or item.past < len(item.tokens) - 1:  # the prompt, for the first time or again
            return RequestView(asked.given, self._min_bits, supported, 0)
        return RequestView(asked.given, self._min_bits, supported, len(item.new), self.entropy, self._passage(item))

    def bits(self, asked: Assignment, view: RequestView | None) -> Assignment:
        """At what the next token of the text with this view is computed."""
        if view is None:
            return asked
        bits = view.lowered(self._steps(view))
        self._rises, self._before = bits > self._before, bits
        return self._state.resolve(bits)

    def first(self, item: Continuation, asked: Assignment) -> Assignment:
        """At what the prompt of `item` would be computed if it began now."""
        return Lowering(self._policy, self._state, self._min_bits).bits(asked, self.view(item, asked))

    def mend(self, item: Continuation, bits: Assignment) -> None:
        """Have what `item` wrote below `bits` computed anew, if they have just risen to these and that is wanted.

        For caches that can take back what was written last.
        """
        if not (self._policy.mends and self._rises):
            return
        wanted = bits.choices[0]
        begin = len(item.tokens) - len(item.new)
        lower = (at for at in range(begin, item.past) if sum(item.written[at]) < sum(wanted))
        del item.written[next(lower, item.past) :]

    def add(self, token: int) -> None:
        """The next token."""
        if self._reader is not None:
            self._reader.push(token)

    @property
    def wants_entropy(self) -> bool:
        return self._policy.wants_entropy

    def _passage(self, item: Continuation) -> Passage | None:
        if self._reader is None:
            return None
        if item.mask is None:
            return self._reader.passage
        return "forced" if item.mask.is_forced(item.tokens) else "structure"


def see(logits: Tensor, lowerings: Sequence[Lowering]) -> None:
    """Show each of `lowerings`, all of one policy, its row of logits [n, V] (float32), which its next token is from."""
    if lowerings and lowerings[0].wants_entropy:
        for lowering, entropy in zip(lowerings, normalised_entropy(logits).tolist(), strict=True):
            lowering.entropy = entropy
