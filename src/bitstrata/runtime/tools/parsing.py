"""A reply that comes in pieces -> its text, and the calls in it, each as soon as it is sure."""

from __future__ import annotations

from dataclasses import dataclass

from .formats import ToolFormat


@dataclass(frozen=True)
class CallDelta:
    """What is new of the call `index`: its name, first, and then more of its arguments."""

    index: int
    name: str | None = None
    arguments: str = ""


class CallParser:
    """Of one reply in `form`. What looks like a call and is none stays text; spaces around calls are left out.

    whole: calls that are complete.
    """

    def __init__(self, form: ToolFormat) -> None:
        self._form = form
        self._held = self._spaces = ""  # spaces: before what may be calls
        self._inside = self._said = self._skips = False
        self.whole = 0
        self._sent: list[int] = []  # characters of the arguments of calls that are being read

    @property
    def count(self) -> int:
        """Calls so far."""
        return self.whole + len(self._sent)

    def push(self, text: str) -> tuple[str, list[CallDelta]]:
        """The text and the calls that became sure with `text`."""
        return self._go_on(text, final=False)

    def flush(self) -> tuple[str, list[CallDelta]]:
        """What is left at the end."""
        return self._go_on("", final=True)

    def _go_on(self, text: str, *, final: bool) -> tuple[str, list[CallDelta]]:
        self._held += text
        said: list[str] = []
        deltas: list[CallDelta] = []
        while self._held:
            if self._inside:
                if not self._read_calls(said, deltas, final):
                    break
            elif not self._read_text(said, final):
                break
        return "".join(said), deltas

    def _read_text(self, said: list[str], final: bool) -> bool:
        """Up to where calls begin. Returns whether they do."""
        if self._skips:
            self._held = self._held.lstrip()
            if not self._held:
                return False
        places = [place for opening in self._form.openings if (place := self._held.find(opening)) >= 0]
        begun = self._held.lstrip()
        if not self._said and not self.count and self._form.bare is not None and self._form.bare.match(begun):
            self._held, self._inside = begun, True
            return True
        if places:
            before = self._held[: min(places)]
            self._say(said, before.rstrip())
            self._spaces = before[len(before.rstrip()) :]
            self._held, self._inside = self._held[min(places) :], True
            return True
        sure = len(self._held) if final else self._sure()
        if not final or self.count:
            sure = len(self._held[:sure].rstrip())
        self._say(said, self._held[:sure])
        self._held = "" if final else self._held[sure:]
        return False

    def _say(self, said: list[str], text: str) -> None:
        if text:
            said.append(text)
            self._skips, self._said = False, True

    def _sure(self) -> int:
        """Characters that cannot be the beginning of an opening."""
        for at in range(max(0, len(self._held) - max(map(len, self._form.openings))), len(self._held)):
            if any(opening.startswith(self._held[at:]) for opening in self._form.openings):
                return at
        return len(self._held)

    def _read_calls(self, said: list[str], deltas: list[CallDelta], final: bool) -> bool:
        """Returns whether they have ended, so that text comes."""
        found = self._form.read(self._held, final)
        if found is None and not self._sent:
            opening = next((one for one in self._form.openings if self._held.startswith(one)), "")
            self._say(said, self._spaces + (opening or self._held))
            self._spaces = ""
            self._held, self._inside = self._held[len(opening) :] if opening else "", False
            return True
        for at, call in enumerate(found.calls if found is not None else ()):
            index = self.whole + at
            if at == len(self._sent):
                deltas.append(CallDelta(index, call.name))
                self._sent.append(0)
            if more := call.arguments[self._sent[at] :]:
                deltas.append(CallDelta(index, arguments=more))
                self._sent[at] = len(call.arguments)
        if found is not None and found.end is not None:
            self._held, self._inside, self._skips = self._held[found.end :], False, True
            self._spaces = ""
            self.whole += len(self._sent)
            self._sent = []
            return True
        if final:
            if not self._sent:
                self._say(said, self._held)
            self._held = ""
        return False
