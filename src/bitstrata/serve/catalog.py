"""The names a model is served under: `name` as it runs by default, `name:BITS`, and `name:PLAN` for named plans."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from ..errors import UnsupportedBitsError
from ..nn import Assignment, BitsOrPlan
from .failures import ApiError, translate
from .replies import ModelCard


class Catalog:
    """
    Args:
        precisions: what requests may choose: bits under themselves, plans under their names. Empty for a model
            that holds one plan's pages and runs nothing else.
        default: of `name` alone.
        size: bytes of weights that one token reads at a precision.
        longest: the longest prompt and reply together, in tokens; None without a limit.
        chat_template: whether the tokenizer has one.
    """

    def __init__(
        self,
        name: str,
        precisions: Mapping[int | str, Assignment],
        default: Assignment,
        size: Callable[[BitsOrPlan], int],
        longest: int | None,
        chat_template: bool,
    ) -> None:
        self.name, self.precisions, self.default = name, precisions, default
        created = int(time.time())

        def card(identifier: str, precision: Assignment) -> ModelCard:
            bits = precision.given
            return ModelCard(
                id=identifier,
                created=created,
                bits=bits if isinstance(bits, int) else None,
                bytes_per_token=size(bits),
                max_model_len=longest,
                chat_template=chat_template,
            )

        self.cards = [card(name, default), *(card(f"{name}:{key}", value) for key, value in precisions.items())]

    def card(self, identifier: str) -> ModelCard:
        """Raises ApiError 404 for a name that is not served."""
        for card in self.cards:
            if card.id == identifier:
                return card
        raise self._unknown(identifier)

    def precision(self, model: str | None, bits: int | str | None) -> Assignment:
        """What a request asks for, by its model's name and its field `bits`.

        Raises ApiError: 404 for an unknown name, 400 for bits that the model does not have or that contradict.
        """
        named: int | str | None = None
        if model is not None and model != self.name:
            head, _, tail = model.rpartition(":")
            named = int(tail) if tail.isascii() and tail.isdigit() and len(tail) <= 3 else tail
            if head != self.name or (isinstance(named, str) and named not in self.precisions):
                raise self._unknown(model)
        if named is not None and bits is not None and named != bits:
            raise ApiError(400, f"model says {named} and bits says {bits}; give one of them", param="bits")
        wanted = named if named is not None else bits
        if wanted is None:
            return self.default
        if wanted in self.precisions:
            return self.precisions[wanted]
        supported = [key for key in self.precisions if isinstance(key, int)]
        if isinstance(wanted, int) and supported:
            raise translate(UnsupportedBitsError(wanted, supported))
        names = ", ".join(str(key) for key in self.precisions)
        hint = f"there are {names}" if names else "this server holds one plan's pages and runs nothing else"
        raise ApiError(400, f"bits {wanted} cannot be used: {hint}", param="bits", code="unsupported_bits")

    def _unknown(self, model: str) -> ApiError:
        names = ", ".join(card.id for card in self.cards)
        return ApiError(
            404, f"there is no model {model!r} here; there are {names}", param="model", code="model_not_found"
        )
