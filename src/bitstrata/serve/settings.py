"""What a server is told when it starts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import UsageError
from ..options import ServerSettings
from ..plans import Plan

ANY = "*"
FROM_MODEL = "auto"  # of generation_config
GENERATION_CONFIGS = (FROM_MODEL, "none")
_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")


@dataclass(frozen=True)
class Settings(ServerSettings):
    """What one server is told.

    Raises UsageError for a name that is no text, a host that is no name, no root_path or generation_config.

    Args:
        name: what the model is called; `name:BITS` is the same model at those bits.
        bits: of requests that name none, an int or a plan's name; the model's highest if None.
        plans: what requests may choose by name, `name:PLAN`.
        max_choices: prompts times `n` of one request.
        allowed_hosts: names that the server goes by beside localhost and addresses; `*` is any.
        allowed_origins: web pages from elsewhere that may call the server (CORS); none by default.
    """

    name: str
    bits: int | str | None = None
    plans: Mapping[str, Plan] = field(default_factory=dict)
    max_choices: int = 128
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        try:
            self.name.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"a model cannot be called {self.name!r}: that is not Unicode text, and no answer could hold it",
                hint="choose another name with --served-model-name",
            ) from None
        if self.generation_config not in GENERATION_CONFIGS:
            raise UsageError(
                f"--generation-config {self.generation_config!r} cannot be used",
                hint=f"it takes {' or '.join(GENERATION_CONFIGS)}",
            )
        if self.root_path and not _PATH.fullmatch(self.root_path):
            raise UsageError(f"--root-path {self.root_path!r} is no path", hint="it begins with /, as in /llm")
        for name in self.allowed_hosts:
            if not is_name(name):
                raise UsageError(
                    f"--allowed-host {name!r} is not a name that a server can go by",
                    hint="give a name in lower case without http://, port and path, or * for any",
                )


def is_name(text: str) -> bool:
    """Whether `text` can be one of a server's names: lower case, without a scheme, port or path."""
    return text == ANY or _NAME.fullmatch(text) is not None
