"""Masks: which tokens may come next if a reply is to be what its constraint says (constraints.py), by llguidance.

    logit'_v = logit_v if the reply so far, then v, is the beginning of an allowed text, else -inf

An end-of-sequence token is among the allowed ones where the reply is a whole text already. A mask follows the tokens
that it is shown, back as well as forth: drafts are drawn through it, and taken back.

Grammars are compiled once and kept. llguidance counts its work, so that no grammar takes long to compile or to follow:
one that would is refused, or ends its own request.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ...errors import CheckError, UsageError
from ..constraints import Constraint

KEPT = 64  # compiled grammars
# Beside llguidance's own limits: states of its lexer, of 1 to 2 kB each, and symbols of a grammar.
LEXER_STATES, GRAMMAR_SIZE = 20_000, 100_000
FEW = 1024  # tokens
SAID = 300  # characters of an error of llguidance


class Fitting:
    """Tokens that may come next. allowed: bool [V]; None for all."""

    def __init__(self, allowed: NDArray[np.bool_] | None) -> None:
        self._allowed = allowed

    def few(self, device: torch.device) -> Tensor | None:
        """The allowed ones, int64 [n], where it is less work to look at them alone than to forbid the others."""
        if self._allowed is None or device.type != "cpu" or not 0 < np.count_nonzero(self._allowed) <= FEW:
            return None
        return torch.from_numpy(np.flatnonzero(self._allowed))

    def leaves(self, logits: Tensor) -> bool:
        """Whether logits [1, V] make one of the allowed ones possible."""
        return bool(self.apply(logits.clone()).amax().isfinite())

    def apply(self, logits: Tensor) -> Tensor:
        """logits [1, V], those of forbidden tokens -inf from here on."""
        if self._allowed is None:
            return logits
        if logits.device.type == "cpu":  # torch would wake its threads for it
            np.putmask(logits.numpy(), ~self._allowed[None], np.float32(-np.inf))
            return logits
        return logits.masked_fill_(torch.from_numpy(~self._allowed).to(logits.device), -torch.inf)


class Mask:
    """The constraint of one reply.

    matcher: llguidance's. begin: tokens of the prompt, which is no part of the reply. ends: end-of-sequence tokens.
    """

    def __init__(self, matcher: Any, begin: int, ends: frozenset[int]) -> None:
        self._matcher, self._begin, self._ends = matcher, begin, ends
        self._followed: list[int] = []

    def fitting(self, tokens: Sequence[int], vocabulary: int) -> Fitting:
        """What may come after `tokens`, the prompt's included. Behind the end of a reply everything may.

        Raises CheckError where the grammar takes too much to follow.
        """
        if self.is_over(tokens):
            return Fitting(None)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return Fitting(np.unpackbits(bits, bitorder="little", count=vocabulary).view(np.bool_))

    def admits(self, tokens: Sequence[int], token: int) -> bool:
        """Whether `token` may come after `tokens`: as `fitting` has it, and far less work.

        Raises CheckError as `fitting`.
        """
        if self.is_over(tokens):
            return True
        forced = self._matcher.compute_ff_tokens()  # the only tokens of a text that is sure: no others that spell it
        admitted = forced[0] == token if forced else self._matcher.validate_tokens([token]) == 1
        self._check()
        return bool(admitted)

    def is_over(self, tokens: Sequence[int]) -> bool:
        """Whether `tokens` end a reply: it is a whole text, and nothing can follow, or an end-of-sequence token did.

        Raises CheckError as `fitting`, and for tokens that the mask did not allow.
        """
        new = list(tokens[self._begin :])
        same = len(self._followed)
        if new[:same] != self._followed:
            pairs = zip(new, self._followed, strict=False)
            same = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(new), same))
            self._matcher.rollback(len(self._followed) - same)
            del self._followed[same:]
        for token in new[same:]:
            if token in self._ends:
                return True
            self._matcher.consume_token(token)
            self._check()
            self._followed.append(token)
        return bool(self._matcher.is_stopped())

    def is_forced(self, tokens: Sequence[int]) -> bool:
        """Whether one text alone can follow `tokens`, however it is cut into tokens.

        Raises CheckError as `is_over`.
        """
        return not self.is_over(tokens) and bool(self._matcher.compute_ff_tokens())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise CheckError(
                f"the reply cannot be held to its constraint: {_said(self._matcher.get_error())}",
                hint="make the schema or the grammar simpler",
            )


class Grammars:
    """What makes masks for one tokenizer; from any thread.

    vocabulary: tokens that the model tells apart. ends: its end-of-sequence tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int, ends: Iterable[int]) -> None:
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, frozenset(ends)
        self._vocabulary_of_grammars: Any = None
        self._compiled: OrderedDict[Constraint, Any] = OrderedDict()
        self._lock = threading.Lock()  # of both
        self._making = threading.Lock()

    def are_for(self, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]) -> bool:
        """Whether they were made for these."""
        return self._tokenizer is tokenizer and self._ends == ends

    def compile(self, constraint: Constraint) -> tuple[str, ...]:
        """Prepare `constraint`; what of it will not be enforced, in words.

        Raises UsageError if it is no such thing, takes too much, or cannot be enforced here at all.
        """
        return tuple(map(_said, self._matcher(constraint).get_grammar_warnings()))

    def mask(self, constraint: Constraint, begin: int) -> Mask:
        """For one reply after a prompt of `begin` tokens. Raises UsageError as `compile`."""
        return Mask(self._matcher(constraint).deep_copy(), begin, self._ends)

    def _matcher(self, constraint: Constraint) -> Any:
        if not isinstance(constraint, Constraint):
            raise UsageError(f"a constraint is made by Constraint's methods, not {type(constraint).__name__}")
        with self._lock:
            if constraint in self._compiled:
                self._compiled.move_to_end(constraint)
                return self._compiled[constraint]
        made = self._make(constraint)
        with self._lock:
            self._compiled[constraint] = made
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        return made

    def _make(self, constraint: Constraint) -> Any:
        library = _library()
        tokens = self._tokens(library)
        try:
            grammar = _grammar(library, constraint)
        except ValueError as error:
            raise UsageError(f"{constraint.what} cannot be used: {_said(str(error))}") from error
        limits = library.LLParserLimits(
            max_lexer_states=LEXER_STATES, max_grammar_size=GRAMMAR_SIZE, verbose_errors=False
        )
        made = library.LLMatcher(tokens, grammar, log_level=0, limits=limits)
        if made.is_error():
            raise UsageError(f"{constraint.what} cannot be used: {_said(made.get_error())}")
        return made

    def _tokens(self, library: Any) -> Any:
        """The tokenizer as the library has it; half a second, once."""
        if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
            raise UsageError(
                "a constraint needs the model's tokenizer, of the tokenizers library",
                hint="put the model's tokenizer.json into its folder",
            )
        if not self._ends:
            raise UsageError("a reply of this model cannot be constrained: it has no end-of-sequence token")
        with self._making:
            if self._vocabulary_of_grammars is None:
                size = max(self._vocabulary, len(self._tokenizer))
                self._vocabulary_of_grammars = library.hf.from_tokenizer(
                    self._tokenizer, n_vocab=size, eos_token=sorted(self._ends)
                )
            return self._vocabulary_of_grammars


def _grammar(library: Any, constraint: Constraint) -> str:
    """As the library's matchers take it. Raises ValueError for GBNF that it cannot read."""
    if constraint.kind == "regex":
        return str(library.LLMatcher.grammar_from_regex(constraint.source))
    if constraint.kind == "grammar":
        return str(library.grammar_from("grammar", constraint.source))
    source = f"start: {constraint.source}\n" if constraint.kind == "json" else constraint.source
    return str(library.LLMatcher.grammar_from_lark(source))


def _library() -> Any:
    try:
        import llguidance
        import llguidance.hf
    except ImportError as error:
        raise UsageError(
            "constrained replies need llguidance, not installed here", hint="pip install 'bitstrata[structured]'"
        ) from error
    return llguidance


def _said(error: str) -> str:
    """An error of llguidance on one line."""
    return " ".join(error.replace("<non-verbose/>", "").split())[:SAID]
