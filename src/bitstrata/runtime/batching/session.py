"""A model run for one caller at a time, without a thread: what `generate`, chats and `bench` are made of.

    with session_of(model) as own:
        text = own.start(prompt_ids, bits, most=64, sampler=Sampler(0.0, 1.0, Random()))
        while text.ended() is None:
            token = own.step(text, bits)
        own.finish(text)

A model keeps its session from one call to the next, with the cache: making one compares batches with the model's own
forward, which takes a second or so. Between the calls the model is an ordinary one, to be called, changed or given to
an engine; one that was changed gets a session of its own anew.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import BitstrataError, ResourceError, UsageError
from ...models import steady_context, vocabulary_size
from ...models.compat import attention_of
from ...nn import Assignment, bits_state
from ..constraints import Constraint
from .alone import passes
from .continuation import Continuation, advance, pick
from .drafts import Drafts
from .forward import steady_rows
from .lowering import Lowering, see
from .masks import Grammars, Mask
from .memory import BLOCK, TokenPool
from .packing import pack
from .prefixes import Prefixes, check_reuse
from .request import Token

CHUNK = 512  # tokens of a prompt in one pass
AMPLE = 1024  # tokens of room at least where there is memory, so that several short texts can stay
HOLDER = "_bitstrata_session"  # the attribute of a model that keeps its session


class Session:
    """Texts that go on in one cache, each step one pass of the model. Made by `session_of`, and used inside of it only.

    longest: the most tokens that a text may have here, its new ones included; None for any number.
    """

    def __init__(self, model: PreTrainedModel, kv_cache_dtype: str = "auto") -> None:
        """Raises as `passes`."""
        self.model = model
        self.longest = steady_context(model.config)
        self._pool = TokenPool(2 * BLOCK, kv_cache_dtype)
        self._forward = passes(model, self._pool)
        self._forward.detach()
        self._steady = steady_rows(model)
        self._prefixes = Prefixes(self._pool, self._steady)
        self._live: list[Continuation] = []
        self._grammars: Grammars | None = None

    @property
    def drafts(self) -> bool:
        """Whether tokens may be drafted: what was computed last can be taken back."""
        return self._pool.kept_as == "beginning"

    def mask(
        self, constraint: Constraint, tokenizer: PreTrainedTokenizerBase, begin: int, ends: frozenset[int]
    ) -> Mask:
        """Of `constraint`, for a text that begins after `begin` tokens. Raises UsageError if it cannot be used."""
        grammars = self._grammars
        if grammars is None or not grammars.are_for(tokenizer, ends):
            grammars = self._grammars = Grammars(tokenizer, vocabulary_size(self.model.config), ends)
        return grammars.mask(constraint, begin)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the model runs batches and nothing else."""
        self._forward.attach()
        try:
            yield
        finally:
            for item in list(self._live):
                self.finish(item)
            self._forward.detach()

    def start(self, tokens: list[int], bits: Assignment, *, reuse: str = "equal", **settings: Any) -> Continuation:
        """A text that begins with `tokens`, with room in the cache, and what this has of it already at `bits`.

        Args:
            reuse: as of Engine.
            settings: of Continuation.

        Raises ResourceError if there is no memory for it.
        """
        item = Continuation(list(tokens), **settings)
        self._prefixes.reuse = check_reuse(reuse)
        self._make_room(item, bits)
        self._live.append(item)
        return item

    def step(self, item: Continuation, bits: Assignment, lowering: Lowering | None = None) -> Token:
        """The next token, added to `item`: feeds at `bits` what is not in the cache yet, a long prompt in parts.

        lowering: what may lower the bits. Raises CheckError if the model's logits are not finite.
        """
        return self._step(item, self._lowered(item, bits, lowering), lowering)

    def draft_step(
        self, item: Continuation, bits: Assignment, drafts: Drafts, lowering: Lowering | None = None
    ) -> list[Token]:
        """As `step`, and more tokens at once where drafts are right; up to one that ends the text.

        Where the bits are lowered a step costs little, and nothing is drafted.
        """
        now = self._lowered(item, bits, lowering)
        if now is not bits or item.past < len(item.tokens) - 1:  # lowered, or the prompt
            return [self._step(item, now, lowering)]
        if item.lacks_room(most := drafts.most(item, self._steady)):
            self._make_room(item, bits)
        made = []
        for token in drafts.cycle(self._forward, item, bits, most):
            item.add(token)
            if lowering is not None:
                lowering.add(token)
            made.append(Token(token, bits.given))
            if item.ended() is not None:
                break
        del item.written[len(item.tokens) - 1 :]  # accepted beyond the end
        return made

    def _lowered(self, item: Continuation, bits: Assignment, lowering: Lowering | None) -> Assignment:
        """At what the next token of `item` is computed; `bits` itself unless it is lowered."""
        if lowering is None:
            return bits
        now = lowering.bits(bits, lowering.view(item, bits))
        if self.drafts:
            lowering.mend(item, now)
        return bits if now.given == bits.given else now

    def _step(self, item: Continuation, bits: Assignment, lowering: Lowering | None) -> Token:
        logits = self._feed(item, bits)
        if lowering is not None:
            see(logits, [lowering])
        (token,) = pick(logits, [item])
        if isinstance(token, BitstrataError):
            raise token
        item.add(token.id)
        if lowering is not None:
            lowering.add(token.id)
        return replace(token, bits=bits.given if isinstance(bits.given, int) else None)

    def finish(self, item: Continuation) -> None:
        """End `item`; what it has in the cache stays there until its place is needed."""
        self._live.remove(item)
        self._prefixes.keep(item)

    def _feed(self, item: Continuation, bits: Assignment) -> Tensor:
        """Logits [1, V] after all tokens of `item`."""
        if item.lacks_room():
            self._make_room(item, bits)
        while True:
            part = item.segment(0, bits)
            (batch,) = pack([part], CHUNK if self._forward.splits else max(CHUNK, part.length), self._steady)
            logits = advance(self._forward, [item], batch)
            if batch[0].is_last:
                return logits

    def _make_room(self, item: Continuation, bits: Assignment) -> None:
        pool, prefixes, room = self._pool, self._prefixes, item.room
        needed = sum(len(other.place) for other in self._live if other.place is not None and other is not item) + room
        # twice as much as is needed, so that a text that goes on does not move at each step; never beyond a context
        ample = max(needed, min(max(2 * needed, AMPLE), self.longest or 2 * needed))
        refused = None
        for size in (pool.tokens, ample, needed, pool.tokens + room):
            try:
                pool.enlarge(size)
            except ResourceError as error:
                refused = error
                continue
            if item.place is None:
                if prefixes.claim(item, bits, self._live):
                    return
            elif (place := prefixes.grow(item.place, item.past, room)) is not None:
                item.place = place
                return
        assert refused is not None  # else what was added last is free in one piece
        raise refused


class _Holder:
    """Where a model keeps its session; a copy of the model has none. user: the thread that is inside `session_of`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.user: int | None = None
        self.session: Session | None = None
        self.made_of: tuple[object, ...] = ()  # what the model was when `session` was made

    def __reduce__(self) -> Any:
        return _Holder, ()


@contextmanager
def session_of(model: PreTrainedModel, kv_cache_dtype: str = "auto") -> Iterator[Session]:
    """The session of `model`, for the calling thread alone.

    kv_cache_dtype: as of Engine; a session that has another one ends.

    Raises:
        UsageError: the model is not quantized, an engine holds it, the thread is inside already, or there is no such
            kv_cache_dtype. BatchError, one of them: it is not "auto", and the model cannot run in batches.
        ResourceError: there is no memory to run it.
    """
    holder: _Holder = model.__dict__.setdefault(HOLDER, _Holder())
    if holder.user == threading.get_ident():
        raise UsageError("this model is in the middle of a call to generate", hint="let it end first")
    with holder.lock:
        holder.user = threading.get_ident()
        try:
            with torch.no_grad():
                found = _current(holder, model, kv_cache_dtype)
                with found.attached():
                    yield found
        finally:
            holder.user = None


def forget(model: PreTrainedModel) -> None:
    """Free what the session of `model` holds, if there is one and nobody is inside."""
    holder: _Holder | None = model.__dict__.get(HOLDER)
    if holder is not None and holder.lock.acquire(blocking=False):
        holder.session = None
        holder.lock.release()


def _current(holder: _Holder, model: PreTrainedModel, kv_cache_dtype: str) -> Session:
    made_of = (kv_cache_dtype, *_fingerprint(model))
    if holder.session is None or made_of != holder.made_of:
        holder.session = None  # frees what it holds
        holder.session, holder.made_of = Session(model, kv_cache_dtype), made_of
    return holder.session


def _fingerprint(model: PreTrainedModel) -> tuple[object, ...]:
    """What a session relies on: which modules there are, what is hooked into them, and where their tensors are."""
    modules = [
        (module, module.__dict__.get("forward"), len(module._forward_hooks), len(module._forward_pre_hooks))
        for module in model.modules()
    ]
    tensors = [
        (
            tensor.data_ptr() if tensor.device.type == "cpu" else id(tensor),
            tensor.device,
            tensor.dtype,
            0 if tensor.is_inference() else tensor._version,
        )
        for tensor in (*model.parameters(), *model.buffers())
    ]
    return attention_of(model), bits_state(model).arithmetic, tuple(modules), tuple(tensors)
