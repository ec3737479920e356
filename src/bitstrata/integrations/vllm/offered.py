"""The bits that a server offers: what a request asks for, checked.

A server checks requests in one process and runs them in another. In the one, vLLM hands a request's parameters to a
class, not to an object, so what is offered has to be known to the process: vLLM serves one model a process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import UnsupportedBitsError, UsageError

KEY = "bits"  # of vllm_xargs
_served: list[Offered] = []


@dataclass(frozen=True)
class Offered:
    """What requests may ask for.

    Args:
        bits: ascending.
        default: of requests that ask for nothing; one of `bits`.
    """

    bits: tuple[int, ...]
    default: int

    def __post_init__(self) -> None:
        if self.default not in self.bits:
            raise UnsupportedBitsError(self.default, self.bits, where="this server")

    def of_request(self, extra: Mapping[str, Any] | None) -> int:
        """The bits of a request with these extra arguments; raises UsageError for ones that are not offered."""
        asked = (extra or {}).get(KEY)
        if asked is None:
            return self.default
        if not isinstance(asked, int) or isinstance(asked, bool):
            supported = ", ".join(map(str, self.bits))
            raise UsageError(f"bits must be a whole number, got {asked!r}", hint=f"supported bits: {supported}")
        if asked not in self.bits:
            raise UnsupportedBitsError(asked, self.bits, where="this server")
        return asked


def serve(offered: Offered) -> None:
    """This process serves a model that offers this."""
    _served[:] = [offered]


def served() -> Offered:
    """What the model of this process offers; UsageError if it is none of ours."""
    if not _served:
        raise UsageError("the model of this server is no bitstrata checkpoint: its bits cannot be chosen")
    return _served[0]
