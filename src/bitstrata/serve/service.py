"""What the parts of one running server share."""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedTokenizerBase

from ..models import bytes_per_token
from ..runtime import Engine
from .catalog import Catalog
from .failures import ApiError
from .metrics import Metrics
from .settings import Settings
from .text import TokenNames


class Service:
    """Lives in one event loop; the engine has a thread of its own.

    active: HTTP requests under way. closing: no new ones are taken.
    Raises UnsupportedBitsError if settings.bits is not among the engine's.
    """

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
        self.engine, self.tokenizer, self.settings = engine, tokenizer, settings
        limits = engine.limits
        supported = limits.state.supported
        sizes = {bits: bytes_per_token(engine.model, bits) for bits in supported}
        default = settings.bits if settings.bits is not None else max(supported)
        templated = bool(tokenizer.chat_template)
        self.catalog = Catalog(settings.name, supported, sizes, default, limits.longest, templated)
        self.metrics = Metrics(engine)
        self.names = TokenNames(tokenizer)
        self.active = 0
        self.closing = False

    def check_choices(self, prompts: int, count: int) -> None:
        """Raises ApiError if `count` replies to each of so many prompts are too many for one request."""
        most = min(self.settings.max_choices, self.engine.max_waiting)
        if prompts * count > most:
            raise ApiError(400, f"prompts times n is {prompts * count}; at most {most} go into one request", param="n")

    @property
    def state(self) -> Literal["ok", "closing", "failed"]:
        """Whether new requests are taken, and if not, why."""
        if self.closing:
            return "closing"
        return "ok" if self.engine.is_open else "failed"
