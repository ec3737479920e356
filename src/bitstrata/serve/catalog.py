"""The names a model is served under: `name` at the default bits, and `name:BITS`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from ..errors import UnsupportedBitsError
from .failures import ApiError, translate
from .replies import ModelCard


class Catalog:
    """
    Args:
        bytes_per_token: bytes of weights that one token reads, for each supported bits.
        default: the bits of `name` alone.
        longest: the longest prompt and reply together, in tokens; None without a limit.
        chat_template: whether the tokenizer has one.

    Raises UnsupportedBitsError if `default` is not supported.
    """

    def __init__(
        self,
        name: str,
        supported: Sequence[int],
        bytes_per_token: Mapping[int, int],
        default: int,
        longest: int | None,
        chat_template: bool,
    ) -> None:
        if default not in supported:
            raise UnsupportedBitsError(default, supported)
        self.name, self.supported, self.default = name, tuple(supported), default
        created = int(time.time())

        def card(identifier: str, bits: int) -> ModelCard:
            return ModelCard(
                id=identifier,
                created=created,
                bits=bits,
                bytes_per_token=bytes_per_token[bits],
                max_model_len=longest,
                chat_template=chat_template,
            )

        self.cards = [card(name, default), *(card(f"{name}:{bits}", bits) for bits in supported)]

    def card(self, identifier: str) -> ModelCard:
        """Raises ApiError 404 for a name that is not served."""
        for card in self.cards:
            if card.id == identifier:
                return card
        raise self._unknown(identifier)

    def bits(self, model: str | None, bits: int | None) -> int:
        """The precision that a request asks for, by its model's name and its field `bits`.

        Raises ApiError: 404 for an unknown name, 400 for bits that the model does not have or that contradict.
        """
        named: int | None = None
        if model is not None and model != self.name:
            head, _, tail = model.rpartition(":")
            if head != self.name or not (tail.isascii() and tail.isdigit()) or len(tail) > 3:
                raise self._unknown(model)
            named = int(tail)
        if named is not None and bits is not None and named != bits:
            raise ApiError(400, f"model says {named} bits and bits says {bits}; give one of them", param="bits")
        chosen = named if named is not None else bits if bits is not None else self.default
        if chosen not in self.supported:
            raise translate(UnsupportedBitsError(chosen, self.supported))
        return chosen

    def _unknown(self, model: str) -> ApiError:
        names = ", ".join(card.id for card in self.cards)
        return ApiError(
            404, f"there is no model {model!r} here; there are {names}", param="model", code="model_not_found"
        )
