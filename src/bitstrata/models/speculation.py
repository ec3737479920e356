"""Self-speculative decoding: the few-bit prefix of the same weights drafts, all bits check.

One cycle, with k drafted tokens:

    draft     k steps at `draft_bits` from the last token on
    verify    one pass at the full bits over the last token and the drafts: k + 1 distributions
    accept    as many drafts as the full bits agree with, and one token more from their own distribution

There is one cache. The drafts' entries are dropped before the verify pass writes those of the full
bits in their place (QSpec, arXiv 2410.11305), so the result does not depend on the draft: greedy
decoding takes the same tokens as without it, sampling draws from the same distribution
(speculative sampling, arXiv 2211.17192, algorithm 1).

How many tokens are drafted follows from how many were accepted: with acceptance a, the expected
tokens of a cycle over its cost in plain steps,

    (1 - a^(k+1)) / (1 - a)  /  (k c + 1 + k r)

has its maximum at some k; c is a draft step's bytes over a full one's, r what another row costs in
the verify pass. If no k > 0 is better than 1, tokens are decoded plainly, and a draft is tried now
and then. Nothing here depends on clocks, so equal seeds give equal tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UnsupportedBitsError, UsageError
from ..nn import BitsState, PlaneLinear, bits_state
from ..planes import whole_number
from .compat import has_sliding_window, record_past, stop_recording, uncuttable_layers

ROW_COST = {"cpu": 0.25}  # of a plain step, for each further row: kernels read the planes once but multiply every row
OTHER_ROW_COST = 0.02
MEMORY = 0.9  # weight of the past in the estimate of acceptance, a drafted token
RETRY = 32  # plain tokens after which a draft is tried again


@dataclass
class Speculation:
    """What to draft with, and after `generate` what came of it.

    draft_bits: precision of the draft; draft_tokens: the most tokens drafted at a time.
    drafted, accepted: draft tokens; cycles: verify passes with a draft; plain: steps without; tokens: new tokens.
    """

    draft_bits: int
    draft_tokens: int = 4
    drafted: int = 0
    accepted: int = 0
    cycles: int = 0
    plain: int = 0
    tokens: int = 0
    streamer: Any = field(default=None, repr=False)

    @property
    def acceptance(self) -> float | None:
        """Share of draft tokens that were accepted; None if there were none."""
        return self.accepted / self.drafted if self.drafted else None

    def count(self, drafted: int, accepted: int) -> None:
        """Add a cycle, or a step without a draft."""
        self.drafted += drafted
        self.accepted += accepted
        self.cycles += drafted > 0
        self.plain += drafted == 0

    def check(self, state: BitsState, bits: Any) -> None:
        """`bits`: what is to check the drafts.

        Raises UnsupportedBitsError for a precision that is not there, UsageError for a draft that cannot help.
        """
        if state.plan is not None:
            raise UsageError(
                "draft_bits needs a model with all of its planes; this one holds only the pages of its plan",
                hint="leave draft_bits out, or load the model without a plan, a budget or fit",
            )
        if not isinstance(bits, int):
            raise UsageError("draft_bits needs one bits value for the whole sequence, not a plan or one a row")
        whole = whole_number(self.draft_bits)
        if whole is None or whole not in state.supported:
            raise UnsupportedBitsError(self.draft_bits, state.supported)
        self.draft_bits = whole
        if self.draft_bits >= bits:
            raise UsageError(
                f"draft_bits {self.draft_bits} must be below the bits that check it, {bits}",
                hint="drafts pay when they read fewer planes",
            )
        if self.draft_tokens < 1:
            raise UsageError(f"draft_tokens must be at least 1, got {self.draft_tokens}")


class DraftLength:
    """How many tokens to draft next.

    Args:
        most: never more than this; cost: c; row_cost: r, see above.
    """

    def __init__(self, most: int, cost: float, row_cost: float) -> None:
        self.most, self.cost, self.row_cost = most, cost, row_cost
        self.acceptance = 0.8  # before anything is known
        self._plain = 0

    def gain(self, count: int) -> float:
        """Expected tokens for the cost of one plain step when `count` tokens are drafted."""
        expected = sum(self.acceptance**power for power in range(count + 1))
        return expected / (count * (self.cost + self.row_cost) + 1)

    def next(self) -> int:
        best = max(range(self.most + 1), key=self.gain)
        if best == 0:
            self._plain += 1
            if self._plain < RETRY:
                return 0
            best = 1
        self._plain = 0
        return best

    @classmethod
    def of(cls, model: PreTrainedModel, speculation: Speculation, bits: int) -> DraftLength:
        """For drafts as `speculation` wants them, checked at `bits`."""
        cost = draft_cost(model, speculation.draft_bits, bits)
        return cls(speculation.draft_tokens, cost, ROW_COST.get(model.device.type, OTHER_ROW_COST))

    def learn(self, drafted: int, accepted: int) -> None:
        """Only tokens up to the first rejection were judged."""
        for judged in range(min(drafted, accepted + 1)):
            self.acceptance = MEMORY * self.acceptance + (1 - MEMORY) * (judged < accepted)


def draft_cost(model: PreTrainedModel, draft_bits: int, bits: int) -> float:
    """Bytes of quantized layers that a step at `draft_bits` reads, over those at `bits`."""

    def size(bits: int) -> float:
        return sum(layer.share * layer.bytes_read(bits if bits in layer.bits else layer.bits[0]) for layer in layers)

    layers = [module for module in model.modules() if isinstance(module, PlaneLinear)]
    return size(draft_bits) / size(bits)


@torch.no_grad()
def speculate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Callable[[Tensor, Tensor], Tensor],
    stopping_criteria: Callable[[Tensor, Any], Tensor],
    generation_config: Any,
    speculation: Speculation,
    **model_kwargs: Any,
) -> Any:
    """A decoding method for `generate(custom_generate=speculate, speculation=...)`: input_ids [1, L] -> [1, L + new].

    Raises UsageError for what cannot be combined with drafts: several sequences, caches that cannot be cut.
    """
    bits = bits_state(model).value
    assert isinstance(bits, int)
    _refuse(input_ids, generation_config, model_kwargs)
    run = _Runner(model, model_kwargs)
    sampling = bool(generation_config.do_sample)
    length = DraftLength.of(model, speculation, bits)
    draw = _drawn if sampling else _likeliest
    ids = input_ids
    logits = run(ids[:, run.cache.get_seq_length() :], bits, keep=1)  # the prompt, or what a given cache lacks of it
    run.remember()
    waiting = draw(_weighed(logits_processor(ids, logits[:, -1]), sampling))  # chosen, not yet in the cache
    ids, done = _emit(ids, [waiting], stopping_criteria, speculation)
    while not done:
        count = min(length.next(), run.room())
        drafts: list[int] = []
        guesses: list[Tensor] = []
        tried = ids
        for _ in range(count):
            logits = run(tried[:, -1:], speculation.draft_bits, keep=1)
            guesses.append(_weighed(logits_processor(tried, logits[:, -1]), sampling))
            drafts.append(draw(guesses[-1]))
            tried = _with(tried, drafts[-1])
        run.drop(count)
        start = ids.shape[1]
        logits = run(tried[:, start - 1 :], bits, keep=count + 1)
        wanted = [
            _weighed(logits_processor(tried[:, : start + place], logits[:, place - count - 1]), sampling)
            for place in range(count + 1)
        ]
        accepted, last = accept(drafts, guesses if sampling else None, wanted, draw, _uniform)
        length.learn(count, accepted)
        speculation.count(count, accepted)
        ids, done = _emit(ids, [*drafts[:accepted], last], stopping_criteria, speculation)
        # all but the last token, as plain decoding leaves it: also where it is over before the last accepted draft
        run.drop(run.cache.get_seq_length() - (ids.shape[1] - 1))
    run.forget()
    if speculation.streamer is not None:
        speculation.streamer.end()
    return ids


class _Runner:
    """Forward passes over one cache."""

    def __init__(self, model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
        self.model = model
        self.can_keep = "logits_to_keep" in kwargs  # then the head runs for those tokens only
        self.cache = kwargs["past_key_values"]
        mask = kwargs.get("attention_mask")
        self.padding = mask if mask is not None and not bool((mask == 1).all()) else None
        self.sliding = has_sliding_window(self.cache)
        self.limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def __call__(self, tokens: Tensor, bits: int, keep: int) -> Tensor:
        """Logits of the last `keep` of `tokens` [1, n], which follow what the cache holds: [1, keep, vocabulary]."""
        extra: dict[str, Any] = {}
        if self.padding is not None:
            seen = self.cache.get_seq_length() + tokens.shape[1]
            mask = torch.nn.functional.pad(self.padding, (0, seen - self.padding.shape[1]), value=1)
            extra = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, -tokens.shape[1] :]}
        if self.can_keep:
            extra["logits_to_keep"] = keep
        output = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, bits=bits, **extra)
        return output.logits[:, -keep:].float()  # type: ignore[no-any-return]

    def remember(self) -> None:
        """From now on keep what leaves a sliding window, until `drop` says that it will not come back."""
        record_past(self.cache)

    def forget(self) -> None:
        """The opposite of `remember`: whoever goes on with the cache gets an ordinary one."""
        stop_recording(self.cache)

    def drop(self, count: int) -> None:
        """Forget the last `count` tokens."""
        if count or self.sliding:
            self.cache.crop(-count)

    def room(self) -> int:
        """How many tokens can be drafted before the model's context ends: the verify pass takes one more."""
        return 1 << 30 if self.limit is None else max(0, self.limit - self.cache.get_seq_length() - 1)


def _refuse(input_ids: Tensor, config: Any, kwargs: dict[str, Any]) -> None:
    if input_ids.shape[0] != 1 or (config.num_beams or 1) > 1 or (config.num_return_sequences or 1) > 1:
        raise UsageError("drafts work for one sequence at a time", hint="leave draft_bits out for a batch or for beams")
    wanted = [name for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
              if getattr(config, name, False)]  # fmt: skip
    if wanted or config.return_dict_in_generate:
        raise UsageError(f"with draft_bits only token ids are returned, not {', '.join(wanted) or 'a dictionary'}")
    cache = kwargs.get("past_key_values")
    if cache is None or not kwargs.get("use_cache", True):
        raise UsageError("drafts need the key-value cache", hint="leave use_cache on")
    stuck = uncuttable_layers(cache)
    if stuck or not hasattr(cache, "crop"):
        raise UsageError(
            f"drafts need a cache that can be cut: this one has {', '.join(stuck) or type(cache).__name__}",
            hint="models with recurrent states, and static caches, run without draft_bits",
        )


def accept(
    drafts: Sequence[int],
    guesses: Sequence[Tensor] | None,
    wanted: Sequence[Tensor],
    draw: Callable[[Tensor], int],
    uniform: Callable[[], float],
) -> tuple[int, int]:
    """How many of `drafts` stay, and the token after them.

    Args:
        guesses: the distribution [V] that each draft was drawn from; None where the likeliest token is taken each time.
        wanted: the distributions [V] of the full bits, one more than drafts; where the likeliest is taken, any scores.
        draw: a token of a distribution, which need not add up to 1.
        uniform: a number in [0, 1), a new one at each call.
    """
    for place, token in enumerate(drafts):
        if guesses is None:
            best = draw(wanted[place])
            if best != token:
                return place, best
            continue
        guess = guesses[place]
        if uniform() >= float(wanted[place][token] / guess[token]):
            rest = (wanted[place] - guess).clamp_min(0)
            return place, draw(rest if float(rest.sum()) > 0 else wanted[place])
    return len(drafts), draw(wanted[-1])


def _weighed(scores: Tensor, sampling: bool) -> Tensor:
    """What a token is drawn from, [V], for processed scores [1, V]."""
    return scores[0].softmax(-1) if sampling else scores[0]


def _drawn(distribution: Tensor) -> int:
    return int(torch.multinomial(distribution, 1))


def _likeliest(scores: Tensor) -> int:
    return int(scores.argmax())


def _uniform() -> float:
    return float(torch.rand(()))


def _with(ids: Tensor, token: int) -> Tensor:
    """ids [1, n] and `token`: [1, n + 1]."""
    return torch.cat([ids, ids.new_tensor([[token]])], 1)


def _emit(
    ids: Tensor, tokens: list[int], stopping_criteria: Callable[[Tensor, Any], Tensor], speculation: Speculation
) -> tuple[Tensor, bool]:
    """Append one token after the other until the generation is over."""
    for token in tokens:
        ids = _with(ids, token)
        speculation.tokens += 1
        if speculation.streamer is not None:
            speculation.streamer.put(torch.tensor([token]))
        if bool(stopping_criteria(ids, None).all()):
            return ids, True
    return ids, False
