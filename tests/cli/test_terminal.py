"""What the command line shows of the package's records: lines or a bar on stderr, escaped, until the pipe closes."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from bitstrata.cli.terminal import shown_on_stderr
from bitstrata.progress import Steps, log, note


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_messages_notes_and_errors_are_lines(capsys):
    with shown_on_stderr():
        log.info("layer [bold]x[/bold]\x1b[2J")
        note("lowered")
        logging.getLogger("bitstrata.serve").error("a request failed", exc_info=ValueError("why"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[:2] == ["layer [bold]x[/bold]\\x1b[2J", "note: lowered"]
    assert err.splitlines()[2:] == ["a request failed", "ValueError: why"]
    log.info("after")
    assert capsys.readouterr().err == ""


def test_steps_are_a_bar_on_a_terminal_and_messages_stay_above_it(monkeypatch):
    shown = _Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    with shown_on_stderr(), Steps("counting", 200, "step") as steps:
        for _ in range(199):
            steps.step("detail")
        log.info("in between")
        with Steps("inside", 2, "part") as inner:
            inner.step()
    text = shown.getvalue()
    assert "199/200" in text
    assert "counting: step" not in text, "no line a step"
    assert "in between" in text
    assert "inside" in text
    assert "\x1b[?25h" in text[text.rindex("\x1b[?25l") :], "the cursor is back"


def test_a_closed_stderr_does_not_end_the_work(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    with shown_on_stderr():
        log.info("one")
        log.info("two")


@pytest.mark.parametrize("ends", [True, False])
def test_the_level_of_the_logger_is_put_back(ends):
    before = log.level
    try:
        with shown_on_stderr():
            if not ends:
                raise ValueError
    except ValueError:
        pass
    assert log.level == before
