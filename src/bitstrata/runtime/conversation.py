"""A conversation with a model whose bits may change from one reply to the next."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..errors import InputError
from ..kernels.cached import check_kv_cache_dtype
from ..models import check_text, encode_turns
from ..nn import BitsOrPlan, bits_state
from ..options import GenerationSettings
from .batching import check_reuse
from .generation import Generation, continue_tokens


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

    Raises:
        UnsupportedBitsError: bits that the model does not have.
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
    ) -> None:
        self._settings = GenerationSettings(max_new_tokens, temperature, top_p, seed, draft_bits, draft_tokens)
        self._reuse, self._kv_cache_dtype = check_reuse(reuse), check_kv_cache_dtype(kv_cache_dtype)
        self.model, self.tokenizer = model, tokenizer
        self._state = bits_state(model)
        self._bits = self._state.resolve(bits)
        self.has_template = bool(tokenizer.chat_template)
        if system is not None:
            _check_system(tokenizer, system)
        self.system = system
        self._turns: list[dict[str, str]] = []
        self.reset()

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

    def reset(self) -> None:
        """Forget all turns but the system instruction."""
        self._turns = [] if self.system is None else [{"role": "system", "content": self.system}]

    def reply(self, text: str, streamer: BaseStreamer | None = None) -> Generation:
        """The model's answer to `text`, at `bits`.

        Raises InputError if `text` is no text, the chat template refuses it or the context is full. The turn is then
        dropped, as it is if anything else ends the reply.
        """
        turns = [*self._turns, {"role": "user", "content": text}]
        settings, bits = self._settings, self.bits
        if settings.draft_bits is not None and isinstance(bits, int) and settings.draft_bits >= bits:
            settings = replace(settings, draft_bits=None)  # this precision is no dearer than its draft
        result = continue_tokens(
            self.model,
            self.tokenizer,
            encode_turns(self.tokenizer, turns),
            text,
            bits=self._bits,
            settings=settings,
            streamer=streamer,
            reuse=self._reuse,
            kv_cache_dtype=self._kv_cache_dtype,
        )
        self._turns = [*turns, {"role": "assistant", "content": result.text}]
        return result


def _check_system(tokenizer: PreTrainedTokenizerBase, system: str) -> None:
    """Raise what the first reply would raise because of the instruction `system`."""
    check_text(system, "the system instruction")
    try:
        encode_turns(tokenizer, [{"role": "system", "content": system}, {"role": "user", "content": "?"}])
    except InputError as error:
        raise InputError(error.message, hint=error.hint or "leave the system instruction out") from error
