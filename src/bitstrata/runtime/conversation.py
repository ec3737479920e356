"""A conversation with a model whose bits may change from one reply to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..errors import InputError
from ..kernels.cached import check_kv_cache_dtype
from ..models import check_text, encode_turns
from ..nn import Assignment, BitsOrPlan, bits_state
from ..options import GenerationSettings
from .batching import check_reuse
from .generation import Generation, continue_tokens, policy_of


class Conversation:
    """Turns of a user and a model.

    With the tokenizer's chat template where there is one. A base model without one continues the text as a
    whole: what the user says is simply what comes next. Control tokens that a turn spells are text (models/turns.py).

    Args:
        bits: of the next replies; the model's highest if None. Set `bits` to change them.
        system: an instruction before the first turn; needs a chat template.
        max_new_tokens, temperature, top_p, seed, draft_bits, draft_tokens: of every reply, as in GenerationSettings.
        reuse: what of the turns so far is not computed again for a reply: "equal" what the same bits wrote, "any" what
            any bits wrote, "off" nothing.
        kv_cache_dtype: how the cache keeps keys and values: auto (the model's dtype), int8 or int4.
        policy, min_bits: what lowers the bits of single tokens, and how far, as of `generate`.

    Raises:
        UnsupportedBitsError: bits or min_bits that the model does not have.
        UsageError: settings that cannot be used, a system instruction without a chat template.
        InputError: a system instruction that is no text, or that the chat template does not take.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        bits: int | None = None,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        draft_bits: int | None = None,
        draft_tokens: int = 4,
        reuse: str = "equal",
        kv_cache_dtype: str = "auto",
        policy: str = "fixed",
        min_bits: int | None = None,
    ) -> None:
        self._settings = GenerationSettings(
            max_new_tokens, temperature, top_p, seed, draft_bits, draft_tokens, policy, min_bits
        )
        policy_of(self._settings)
        self._reuse, self._kv_cache_dtype = check_reuse(reuse), check_kv_cache_dtype(kv_cache_dtype)
        self.model, self.tokenizer = model, tokenizer
        self._state = bits_state(model)
        self._bits = self._state.resolve(bits)
        if min_bits is not None:
            self._state.resolve(min_bits)
        self.has_template = bool(tokenizer.chat_template)
        self._system: str | None = None
        self._turns: list[dict[str, str]] = []  # the user's and the model's
        self.system = system

    @property
    def bits(self) -> BitsOrPlan:
        """Of the next reply: a number, or the plan in memory where that is all there is."""
        bits: BitsOrPlan = self._bits.given
        return bits

    @bits.setter
    def bits(self, value: int) -> None:
        self._bits = self._state.resolve(value)

    @property
    def supported(self) -> tuple[int, ...]:
        """The numbers that `bits` may be set to."""
        return self._state.supported

    @property
    def system(self) -> str | None:
        """The instruction before the first turn; None if there is none. Setting it keeps the turns.

        Raises as the constructor does; then it stays what it was.
        """
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text is not None:
            _check_system(self.tokenizer, text)
        self._system = text

    @property
    def messages(self) -> list[dict[str, str]]:
        """All turns, the system instruction first, each with `role` and `content`. Setting them begins from there.

        Raises:
            InputError: no list of messages of the roles system (the first alone), user and assistant, those in turn,
                with a text each; or the user's is the last.
            UsageError: a system instruction without a chat template.
        """
        first = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*first, *(dict(turn) for turn in self._turns)]

    @messages.setter
    def messages(self, messages: Sequence[Mapping[str, Any]]) -> None:
        turns = _checked(messages)
        system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else None
        self.system = system
        self._turns = turns

    def reset(self) -> None:
        """Forget all turns but the system instruction."""
        self._turns = []

    def reply(self, text: str, streamer: BaseStreamer | None = None) -> Generation:
        """The model's answer to `text`, at `bits`.

        Raises InputError if `text` is no text, the chat template refuses it or the context is full. The turn is then
        dropped, as it is if anything else ends the reply.
        """
        result = self._answer(text, self._turns, self._bits, streamer)
        self._turns = [*self._turns, {"role": "user", "content": text}, {"role": "assistant", "content": result.text}]
        return result

    def compare(self, choices: Sequence[int], text: str | None = None) -> list[Generation]:
        """Answers to `text`, or to the last turn again, at each of the bits in `choices`; none is kept.

        Raises:
            UnsupportedBitsError: bits that the model does not have.
            InputError: as `reply`; or there is no turn yet.
        """
        resolved = [self._state.resolve(bits) for bits in choices]
        turns = self._turns
        if text is None:
            if not turns:
                raise InputError("there is no turn yet", hint="say what is to be answered")
            *turns, last, _ = turns
            text = last["content"]
        return [self._answer(text, turns, bits, None) for bits in resolved]

    def _answer(
        self, text: str, turns: Sequence[dict[str, str]], chosen: Assignment, streamer: BaseStreamer | None
    ) -> Generation:
        first = [] if self._system is None else [{"role": "system", "content": self._system}]
        settings, bits = self._settings, chosen.given
        if settings.draft_bits is not None and isinstance(bits, int) and settings.draft_bits >= bits:
            settings = replace(settings, draft_bits=None)  # this precision is no dearer than its draft
        return continue_tokens(
            self.model,
            self.tokenizer,
            encode_turns(self.tokenizer, [*first, *turns, {"role": "user", "content": text}]),
            text,
            bits=chosen,
            settings=settings,
            streamer=streamer,
            reuse=self._reuse,
            kv_cache_dtype=self._kv_cache_dtype,
        )


def _checked(messages: Any) -> list[dict[str, str]]:
    """`messages` as turns. Raises InputError for what no conversation can have been."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InputError(f"messages are a list, not {type(messages).__name__}")
    turns: list[dict[str, str]] = []
    for place, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise InputError(f"message {place} has no text as its content", hint='{"role": "user", "content": "..."}')
        role = message.get("role")
        said = len([turn for turn in turns if turn["role"] != "system"])
        wanted = ["user", "assistant"][said % 2]
        if role != wanted and not (role == "system" and place == 1):
            raise InputError(f"message {place} is of role {role!r}, where {wanted} has the turn")
        check_text(message["content"], f"message {place}")
        turns.append({"role": str(role), "content": message["content"]})
    if turns and turns[-1]["role"] == "user":
        raise InputError("the last message is the user's", hint="leave it out, and say it in the conversation")
    return turns


def _check_system(tokenizer: PreTrainedTokenizerBase, system: str) -> None:
    """Raise what the first reply would raise because of the instruction `system`."""
    check_text(system, "the system instruction")
    try:
        encode_turns(tokenizer, [{"role": "system", "content": system}, {"role": "user", "content": "?"}])
    except InputError as error:
        raise InputError(error.message, hint=error.hint or "leave the system instruction out") from error
