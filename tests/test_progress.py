"""What the package says: through logging, shown by nobody unless asked; notes belong to the verb that made them."""

from __future__ import annotations

import logging
import threading

import pytest

import bitstrata
from bitstrata.errors import UsageError
from bitstrata.progress import MAX_LINES, Progress, Steps, log, note, notes, own_notes


def test_nothing_is_shown_unless_asked(capfd):
    log.info("working")
    note("lowered")
    with Steps("counting", 2, "step") as steps:
        steps.step()
    assert capfd.readouterr() == ("", "")


def test_a_user_of_logging_sees_notes_messages_and_a_line_a_step(caplog):
    with caplog.at_level(logging.INFO, "bitstrata"):
        log.info("working")
        note("lowered")
        with Steps("counting", 2, "step") as steps:
            steps.step("first", skipped=True)
            steps.step()
    found = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert found == [
        ("INFO", "working"),
        ("WARNING", "lowered"),
        ("INFO", "counting: step 1/2 first"),
        ("INFO", "counting: step 2/2"),
    ]


def test_long_work_logs_at_most_so_many_lines_and_the_last_step(caplog):
    total = 5 * MAX_LINES + 1
    with caplog.at_level(logging.DEBUG, "bitstrata"), Steps("counting", total, "step") as steps:
        for _ in range(total):
            steps.step()
    states: list[Progress] = [record.progress for record in caplog.records]
    lines = [record for record in caplog.records if record.levelno == logging.INFO]
    assert len(lines) <= MAX_LINES
    assert lines[-1].getMessage() == f"counting: step {total}/{total}"
    assert "eta 0:" in lines[0].getMessage()
    assert [state.done for state in states] == [*range(total + 1), total]
    assert [state.ended for state in states] == [False] * (total + 1) + [True]


def test_notes_go_to_the_verb_that_is_running_whatever_logging_shows():
    note("before any verb")
    with own_notes():
        note("outer")
        with own_notes():
            note("inner")
            assert notes() == ("inner",)
        assert notes() == ("outer",)
    assert notes() == ()


def test_verbs_in_two_threads_keep_their_notes_apart():
    found: dict[str, tuple[str, ...]] = {}
    both = threading.Barrier(2)

    @own_notes()
    def verb(name: str) -> None:
        for number in range(3):
            both.wait()
            note(f"{name} {number}")
        found[name] = notes()

    threads = [threading.Thread(target=verb, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: (f"{name} 0", f"{name} 1", f"{name} 2") for name in "ab"}


@pytest.mark.parametrize("verb", ["bench", "demo", "evaluate", "generate", "load", "plan", "quantize", "resize"])
def test_the_former_reporter_is_refused_by_naming_logging(verb):
    with pytest.raises(UsageError, match="has no argument reporter") as caught:
        getattr(bitstrata, verb)(reporter=None)
    assert "logging" in str(caught.value.hint)


def test_an_unknown_argument_is_refused_by_naming_the_nearest():
    with pytest.raises(UsageError, match="load has no argument budjet") as caught:
        bitstrata.load("nowhere", budjet="1GB")
    assert caught.value.hint == "did you mean budget?"
