"""Which versions of vLLM this code was written for: it uses interfaces that vLLM changes without notice."""

from __future__ import annotations

import os

from ...errors import UsageError

KNOWN = ("0.32", "0.33")
ANY_VERSION = "BITSTRATA_VLLM_ANY_VERSION"


def check_version(version: str) -> None:
    """Raise UsageError for a vLLM that is not known, unless the environment says to go on."""
    if ".".join(version.split(".")[:2]) not in KNOWN and os.environ.get(ANY_VERSION) != "1":
        raise UsageError(
            f"vLLM {version} is not known to this bitstrata, which was written for {' and '.join(KNOWN)}",
            hint=f"install one of these, or set {ANY_VERSION}=1 to try: compare some answers with `bitstrata generate`",
        )
