"""`bitstrata.generate`: continue a prompt at given bits."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..errors import InputError, UsageError
from ..kernels.cached import check_kv_cache_dtype
from ..models import (
    Speculation,
    check_vocabulary,
    context_limit,
    encode_prompt,
    end_tokens,
    input_device,
    load_tokenizer,
    resolve,
    score_rules,
)
from ..nn import Assignment, BitsOrPlan, bits_state
from ..options import GenerationSettings
from ..plans import Plan, bits_name, choose_bits, highest_bits, load
from ..progress import note
from ..torch_state import ordinary_torch
from ..verbs import named
from .batching import Continuation, Drafts, Lowering, Lowerings, Mask, Sampler, Session, session_of
from .constraints import Constraint
from .policy import LoadPolicy, Policy, parse_policy


@dataclass(frozen=True)
class Generation:
    """A continuation. `tokens` counts the new tokens; tokens_per_second leaves the prompt's pass out.

    `bits` is None for a model that is not quantized, and a plan's name for a plan. acceptance: share of the tokens
    drafted at `draft_bits` that `bits` agreed with. first_token_seconds: to the first new token; reused_tokens: of the
    prompt, those that the model had from an earlier call. tokens_by_bits: new tokens by the bits that computed them,
    those at a plan under "plan"; empty where transformers' own generate made them.
    """

    prompt: str
    text: str
    bits: int | str | None
    tokens: int
    seconds: float
    tokens_per_second: float | None
    draft_bits: int | None = None
    acceptance: float | None = None
    first_token_seconds: float | None = None
    reused_tokens: int = 0
    tokens_by_bits: dict[str, int] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """What computed the new tokens, in words: `3 bits`, `2 to 4 bits (17 at 2, 5 at 4)` or `plan NAME`."""
        if isinstance(self.bits, str):
            return f"plan {self.bits}"
        used = list(self.tokens_by_bits)
        if len(used) < 2:
            return f"{next(iter(used), self.bits)} bits"
        counts = ", ".join(f"{count} at {bits}" for bits, count in self.tokens_by_bits.items())
        return f"{used[0]} to {used[-1]} bits ({counts})"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return self.prompt + self.text


class _Clock(BaseStreamer):
    """Notes when tokens arrive, and passes them on to another streamer."""

    def __init__(self, onward: BaseStreamer | None) -> None:
        self.times: list[float] = []
        self._onward = onward

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if self._onward is not None:
            self._onward.put(value)

    def end(self) -> None:
        if self._onward is not None:
            self._onward.end()


@named
@ordinary_torch()
def generate(
    model: str | Path | PreTrainedModel,
    prompt: str,
    bits: int | Plan | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    *,
    top_p: float = 1.0,
    seed: int = 0,
    draft_bits: int | None = None,
    draft_tokens: int = 4,
    device: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    streamer: BaseStreamer | None = None,
    kv_cache_dtype: str = "auto",
    constraint: Constraint | None = None,
    policy: str = "fixed",
    min_bits: int | None = None,
) -> Generation:
    """Continue `prompt`, which starts as the tokenizer starts a text (models/tokens.py).

    Args:
        model: a checkpoint folder or hub id, `OUT` or `OUT:BITS`; or a loaded model.
        bits: the precision, or a plan; else the one in `OUT:BITS`; else the highest.
        max_new_tokens, temperature, top_p, seed, draft_bits, draft_tokens: as in GenerationSettings.
        streamer: receives tokens as they come.
        kv_cache_dtype: how the cache keeps keys and values: auto (the model's dtype), int8 or int4.
        constraint: what the new text must be, such as JSON of a schema.
        policy: what lowers the bits of single tokens, as `parse_policy` reads it, down to `min_bits` or the model's
            lowest.

    Raises:
        UnsupportedBitsError: bits or min_bits that the model does not have.
        UsageError: bits given twice and differently, a negative temperature, no new tokens asked for, min_bits above
            the bits; a kv_cache_dtype, constraint or policy that there is none of, or that this architecture or a text
            of this length cannot have; a policy for a plan, or one that looks at many requests.
        InputError: a prompt that is no text or has no tokens, a token beyond the model's vocabulary, a full context.
    """
    settings = GenerationSettings(max_new_tokens, temperature, top_p, seed, draft_bits, draft_tokens, policy, min_bits)
    policy_of(settings)
    check_kv_cache_dtype(kv_cache_dtype)  # before a model is loaded
    if not isinstance(model, PreTrainedModel):
        target, bits = choose_bits(str(model), bits)
        model = load(target, bits=bits, device=device, max_bits=None if bits is None else highest_bits(bits))
    tokenizer = tokenizer or load_tokenizer(resolve(str(model.name_or_path)))
    state = bits_state(model)
    resolved = state.resolve(bits)
    if min_bits in state.supported and isinstance(resolved.given, int) and min_bits > resolved.given:
        raise UsageError(f"min_bits={min_bits} is above bits={resolved.given}")
    return continue_tokens(
        model,
        tokenizer,
        encode_prompt(tokenizer, prompt),
        prompt,
        bits=resolved,
        settings=settings,
        streamer=streamer,
        kv_cache_dtype=kv_cache_dtype,
        constraint=constraint,
    )


@ordinary_torch()
def continue_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    prompt: str,
    *,
    bits: BitsOrPlan | Assignment | None,
    settings: GenerationSettings,
    streamer: BaseStreamer | None = None,
    reuse: str = "equal",
    kv_cache_dtype: str = "auto",
    constraint: Constraint | None = None,
) -> Generation:
    """Continue the tokens `ids`, which stand for `prompt`; `bits` None runs a model that is not quantized.

    Ends at every end-of-sequence token that the model's configs or the tokenizer name. reuse: what of `ids` is not
    computed again if the model still has it from an earlier call; kv_cache_dtype: how it is kept; both as of Engine.
    constraint: as of Request.

    Raises:
        InputError: a token beyond the model's vocabulary, or the prompt fills the model's context.
        UsageError: a kv_cache_dtype or a constraint that there is none of, or that this model or a text of this length
            cannot have.
    """
    chosen = None if bits is None else bits_state(model).resolve(bits)
    lowering = _lowering(model, tokenizer, ids, chosen, settings)
    check_vocabulary(ids, model.config, tokenizer)
    limit, new_tokens = context_limit(model.config), settings.max_new_tokens
    if limit is not None and len(ids) + new_tokens > limit:
        if len(ids) >= limit:
            raise InputError(f"the prompt has {len(ids)} tokens, the model's context is {limit}", hint="shorten it")
        note(f"max-new-tokens lowered from {new_tokens} to {limit - len(ids)}, what the context leaves")
        new_tokens = limit - len(ids)

    ends = end_tokens(model, tokenizer)
    clock = _Clock(streamer)
    started = time.perf_counter()
    made, reused = None, 0
    counted: Counter[str] = Counter()
    if chosen is not None:
        with session_of(model, kv_cache_dtype) as own:
            long = own.longest is not None and len(ids) + new_tokens > own.longest
            if not long and (own.drafts or settings.draft_bits is None):
                mask = None if constraint is None else own.mask(constraint, tokenizer, len(ids), ends)
                item = _by_session(own, ids, new_tokens, ends, chosen, settings, clock, reuse, mask, lowering, counted)
                made, reused = item.new, item.reused
    if made is None:
        if check_kv_cache_dtype(kv_cache_dtype) != "auto":
            raise UsageError(
                f"this text is made by transformers' own generate, which keeps no cache in {kv_cache_dtype}: "
                + ("the model is not quantized" if chosen is None else "its positions depend on how long it is"),
                hint="leave kv_cache_dtype (--kv-cache-dtype) out",
            )
        if constraint is not None:
            raise UsageError("this text is made by transformers' own generate, which cannot hold it to a constraint")
        if lowering is not None:
            raise UsageError("this text is made by transformers' own generate, which follows no policy")
        made = _by_transformers(model, tokenizer, ids, new_tokens, ends, chosen, settings, clock)
    arrived = clock.times[1:]  # the first entry is the prompt
    between = arrived[-1] - arrived[0] if len(arrived) > 1 else 0.0
    return Generation(
        prompt=prompt,
        text=str(tokenizer.decode(made, skip_special_tokens=True)),
        bits=None if chosen is None else bits_name(chosen.given),
        tokens=len(made),
        seconds=time.perf_counter() - started,
        tokens_per_second=(len(arrived) - 1) / between if between > 0 else None,
        draft_bits=settings.draft_bits,
        acceptance=None if settings.draft_bits is None else model.speculation.acceptance,  # type: ignore[arg-type, union-attr]
        first_token_seconds=arrived[0] - started if arrived else None,
        reused_tokens=reused,
        tokens_by_bits=dict(sorted(counted.items())),
    )


def policy_of(settings: GenerationSettings) -> Policy | None:
    """What lowers the bits of one text; None for nothing.

    Raises UsageError for what is no policy, or one that needs many requests, or whose signal drafts do not give.
    """
    policy = parse_policy(settings.policy)
    if isinstance(policy, LoadPolicy):
        raise UsageError(
            "policy load looks at many requests at a time, and here is one", hint="bitstrata serve and Engine have it"
        )
    if policy.wants_entropy and settings.draft_bits is not None:
        raise UsageError(f"policy {policy.name} looks at each token, which drafts skip", hint="give one of the two")
    return None if type(policy) is Policy else policy


def _lowering(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    bits: Assignment | None,
    settings: GenerationSettings,
) -> Lowering | None:
    """Of the text that goes on after `ids`. Raises UsageError and UnsupportedBitsError as `generate`."""
    policy = policy_of(settings)
    if policy is None:
        return None
    if bits is None or not isinstance(bits.given, int):
        what = "a model that is not quantized" if bits is None else "a plan"
        raise UsageError(f"policy {policy.name} cannot lower {what}", hint="policies lower bits that are an int")
    state = bits_state(model)
    least = state.supported[0] if settings.min_bits is None else settings.min_bits
    state.resolve(least)
    return Lowerings(policy, state, tokenizer).of(ids, least)


def _by_session(
    own: Session,
    ids: list[int],
    new_tokens: int,
    ends: frozenset[int],
    bits: Assignment,
    settings: GenerationSettings,
    clock: _Clock,
    reuse: str,
    mask: Mask | None,
    lowering: Lowering | None,
    counted: Counter[str],
) -> Continuation:
    """The text, made by our own steps; its tokens are added to `counted` by their bits."""
    drafts = None
    if settings.draft_bits is not None:
        speculation = Speculation(settings.draft_bits, settings.draft_tokens)
        drafts = Drafts(own.model, speculation, bits)
        own.model.speculation = speculation  # type: ignore[assignment]
    clock.put(torch.tensor([ids]))
    item = own.start(
        ids,
        bits,
        reuse=reuse,
        most=new_tokens,
        sampler=Sampler(settings.temperature, settings.top_p, Random(settings.seed)),
        ends=ends,
        rules=score_rules(own.model, ids, new_tokens, ends),
        mask=mask,
    )
    try:
        while not item.new or item.ended() is None:
            for token in (
                [own.step(item, bits, lowering)] if drafts is None else own.draft_step(item, bits, drafts, lowering)
            ):
                counted["plan" if token.bits is None else str(token.bits)] += 1
                clock.put(torch.tensor([token.id]))
    finally:
        own.finish(item)
    if drafts is not None:
        drafts.speculation.tokens = len(item.new)
    clock.end()
    return item


def _by_transformers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    new_tokens: int,
    ends: frozenset[int],
    bits: Assignment | None,
    settings: GenerationSettings,
    clock: _Clock,
) -> list[int]:
    """The same by transformers' generate: of dense models, and of drafts for models that cannot run in batches."""
    extra: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    random_numbers: AbstractContextManager[None] = nullcontext()
    if settings.temperature > 0:
        extra = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        random_numbers = _seeded(settings.seed)
    if ends:
        extra["eos_token_id"] = sorted(ends)
    if bits is not None:
        extra["bits"] = bits
    if settings.draft_bits is not None:
        extra |= {"draft_bits": settings.draft_bits, "draft_tokens": settings.draft_tokens}
    extra |= {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}  # whatever its file says
    device = input_device(model)
    with torch.no_grad(), random_numbers:
        output = model.generate(  # type: ignore[operator]
            torch.tensor([ids], device=device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=device),
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=clock,
            **extra,
        )
    new: list[int] = output[0, len(ids) :].tolist()
    return new


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's generators seeded, which is where `generate` samples from, and afterwards as the program had them."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(gpus):
        torch.manual_seed(seed)
        yield
