"""What the command line shows of the package's records: lines or a bar on stderr, escaped, until the pipe closes."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest

from bitstrata.cli.terminal import remark, shown_on_stderr, side_by_side
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


@pytest.mark.parametrize("colours", [True, False])
def test_texts_side_by_side_and_remarks_have_colours_on_terminals_alone(monkeypatch, colours: bool):
    shown = _Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", shown)
    for name, value in {"TERM": "xterm", "COLUMNS": "90", "COLORTERM": "truecolor"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not colours:
        monkeypatch.setattr(shown, "isatty", lambda: False)
    side_by_side([("2 bits", "the same\x1b[2J, then [b]this[/b]"), ("4 bits", "the same\x1b[2J, then that")])
    remark("a\x1bremark")
    text = shown.getvalue()
    assert ("\x1b[33m" in text) == ("\x1b[2m" in text) == colours
    assert "\x1b[2J" not in text
    assert "\x1bremark" not in text
    first, second = re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()[:2]
    assert re.split(" {2,}", first.strip()) == ["2 bits", "4 bits"]
    assert re.split(" {2,}", second.strip()) == ["the same\\x1b[2J, then [b]this[/b]", "the same\\x1b[2J, then that"]
    if colours:
        assert "then \x1b[33m[b]this" in text


def test_no_color_is_obeyed(monkeypatch):
    shown = _Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    side_by_side([("2 bits", "one"), ("4 bits", "two")])
    assert "\x1b[33m" not in shown.getvalue()
