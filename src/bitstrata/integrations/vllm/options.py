"""What the operator of a server sets: `vllm serve OUT --hf-overrides '{"bitstrata": {"bits": 3, "max_bits": 4}}'`.

That is the one door of vLLM whose contents reach the server, the engine and every worker, on other machines too, as a
part of the model's config. `--additional-config` is not there yet when a quantization config is made, and environment
variables do not reach other machines.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import UsageError
from ...planes.weights import MAX_BITS

FIELD = "bitstrata"


class ServeOptions(BaseModel):
    """The options of one server.

    Args:
        bits: of requests that ask for none; the highest that is loaded if None.
        max_bits: planes and scales above it are not loaded.
        share_prefixes: requests may go on from keys and values that were computed at other bits.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    bits: int | None = Field(default=None, ge=1, le=MAX_BITS)
    max_bits: int | None = Field(default=None, ge=1, le=MAX_BITS)
    share_prefixes: bool = False

    @classmethod
    def parse(cls, raw: Any) -> ServeOptions:
        """The options from what was overridden in a model's config, None if nothing was; raises UsageError."""
        try:
            return cls.model_validate({} if raw is None else raw)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in (FIELD, *first["loc"]))
            known = ", ".join(cls.model_fields)
            raise UsageError(f"--hf-overrides: {field}: {first['msg']}", hint=f"options: {known}") from error
