"""What a command left behind, and what every refusal must look like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def refused(self, code: int, *said: str) -> None:
        """Assert a refusal: this exit code, these words, a hint, no traceback, nothing on stdout."""
        assert self.code == code, f"exit code {self.code}, expected {code}: {self.err}"
        for part in said:
            assert part in self.err, f"{part!r} is not in {self.err!r}"
        assert "error: " in self.err
        assert "Traceback" not in self.err
        assert "this is a bug" not in self.err
        assert "hint: " in self.err, f"no hint in {self.err!r}"
        assert self.out == ""


Command = Callable[..., Outcome]
