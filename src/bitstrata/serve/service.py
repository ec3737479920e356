"""What the parts of one running server share."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from ..errors import UnsupportedBitsError, UsageError
from ..models import bytes_per_token
from ..nn import Assignment, BitsState
from ..runtime import Engine
from .aside import Aside
from .catalog import Catalog
from .failures import ApiError
from .metrics import Metrics
from .settings import Settings
from .text import TokenNames


class Service:
    """Lives in one event loop; the engine has a thread of its own.

    active: HTTP requests under way. closing: no new ones are taken.
    Raises UnsupportedBitsError or UsageError if settings.bits or a plan is not of the engine's model.
    """

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
        self.engine, self.tokenizer, self.settings = engine, tokenizer, settings
        precisions = _precisions(engine.limits.state, settings)
        self.catalog = Catalog(
            settings.name,
            precisions,
            engine.limits.state.resolve(None) if settings.bits is None else precisions[settings.bits],
            lambda precision: bytes_per_token(engine.model, precision),
            engine.limits.longest,
            bool(tokenizer.chat_template),
        )
        self.metrics = Metrics(engine)
        self.names = TokenNames(tokenizer)
        longest = engine.limits.longest - 1  # a new token at least must find room
        self.aside = Aside(tokenizer, min(longest, settings.max_prompt_tokens or longest))
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


def _precisions(state: BitsState, settings: Settings) -> dict[int | str, Assignment]:
    """What requests may choose. Raises UnsupportedBitsError and UsageError for settings that do not fit the model."""
    if state.plan is not None:
        if settings.bits is not None or settings.min_bits is not None or settings.plans:
            raise UsageError("a model that holds one plan's pages runs nothing else", hint="leave bits and plans out")
        return {}
    if settings.min_bits is not None and settings.min_bits not in state.supported:
        supported = ", ".join(map(str, state.supported))
        raise UsageError(f"min_bits={settings.min_bits} is not available", hint=f"supported bits: {supported}")
    found: dict[int | str, Assignment] = {bits: state.resolve(bits) for bits in state.supported}
    found.update({name: state.resolve(replace(plan, name=name)) for name, plan in settings.plans.items()})
    if isinstance(settings.bits, int) and settings.bits not in found:
        raise UnsupportedBitsError(settings.bits, state.supported)
    if settings.bits is not None and settings.bits not in found:
        raise UsageError(f"there is no plan {settings.bits!r}", hint=f"plans: {', '.join(settings.plans) or 'none'}")
    return found
