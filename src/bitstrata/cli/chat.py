"""`bitstrata chat`."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import fields
from pathlib import Path

from transformers import TextStreamer

from ..errors import BitstrataError, InputError, UsageError
from ..models import load_tokenizer, resolve
from ..nn import BitsOrPlan
from ..options import ChatCommand, GenerationSettings
from ..plans import bytes_text, choose_bits, resize
from ..runtime import Conversation, Generation, policy_of
from .output import writing_stdout
from .sizing import load_sized
from .terminal import remark, side_by_side

COMMANDS = """/bits N         answer at N bits from now on; /bits alone says what there is
/compare N M    answer the last turn again at N and at M bits, side by side; /compare N M TEXT answers TEXT.
                Neither answer is kept
/system TEXT    instruct the model from now on; /system off takes the instruction away, /system alone shows it
/save FILE      write the conversation as JSON; /open FILE goes on with one
/resize SIZE    with --budget or --fit: hold this much from now on, say 400MB, 3.2bpw or plan.json
/reset          forget the conversation
/help           these lines
/quit           leave; so do the end of input, and Ctrl-C twice
\"\"\"             begins and ends a text of several lines; so does \\ at the end of a line
Ctrl-C          ends a reply"""
SEVERAL_LINES = '"""'


def run(options: ChatCommand) -> None:
    policy_of(options)  # refused before a model is loaded
    target, chosen = choose_bits(options.model, options.bits)
    loaded = load_sized(target, chosen, options, context=None)
    tokenizer = load_tokenizer(resolve(target, hub=options.hub, weights=False))
    settings = {one.name: getattr(options, one.name) for one in fields(GenerationSettings)}
    talk = Conversation(
        loaded,
        tokenizer,
        bits=chosen,
        system=options.system,
        reuse=options.reuse,
        kv_cache_dtype=options.kv_cache_dtype,
        **settings,
    )
    draft_bits = options.draft_bits
    if draft_bits is not None and draft_bits not in talk.supported:
        raise UsageError(f"draft-bits {draft_bits} is not among {_choice(talk)}")
    if isinstance(sys.stdin, io.TextIOWrapper):  # a line that is not text is refused like any other wrong input
        sys.stdin.reconfigure(errors="surrogateescape")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  (input then takes arrow keys)
    kind = "" if talk.has_template else "; the tokenizer has no chat template, so the model continues your text"
    remark(f"{_precision(talk.bits)} of {_choice(talk)}{kind}; /help lists commands")
    while (text := _read()) is not None:
        if not text.strip():
            continue
        try:
            if text.startswith("/") and not _obey(talk, text):
                return
            if not text.startswith("/"):
                streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
                remark(_figures(talk.reply(text.removeprefix(SEVERAL_LINES), streamer)))
        except BitstrataError as error:
            full = "" if text.startswith("/") else "; /reset forgets the conversation"
            remark(f"{error.sentence}{full}")
        except KeyboardInterrupt:
            remark("stopped; this turn is forgotten")


def _read() -> str | None:
    """What the user says, a command or a text of one or several lines; None at the end of input.

    A text of several lines keeps its first mark, so that it is never a command. Ctrl-C forgets what was begun; twice
    it ends the program.
    """
    interrupted = False
    while True:
        try:
            return _text(_line("> "))
        except EOFError:
            return None
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            remark("\nCtrl-C again, Ctrl-D or /quit leaves")


def _text(line: str) -> str:
    """The text that begins with `line`."""
    if line.startswith(SEVERAL_LINES):
        text = line
        while SEVERAL_LINES not in text[len(SEVERAL_LINES) :]:
            text += "\n" + _line(". ")
        return text[: text.rindex(SEVERAL_LINES)]
    while line.endswith("\\"):
        line = f"{line[:-1]}\n{_line('. ')}"
    return line


def _line(prompt: str) -> str:
    return input(prompt if sys.stdin.isatty() else "")


def _obey(talk: Conversation, text: str) -> bool:
    """Whether to go on after a command. Raises BitstrataError for one that cannot be done."""
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    match name, rest:
        case "/quit" | "/exit", "":
            return False
        case "/reset", "":
            talk.reset()
            remark("forgotten")
        case "/bits", "":
            remark(f"{_precision(talk.bits)} of {_choice(talk)}")
        case "/bits", value:
            (talk.bits,) = _numbers("/bits", [value])
            remark(_precision(talk.bits))
        case "/compare", value if len(words := value.split(maxsplit=2)) >= 2:
            choices = _numbers("/compare", words[:2])
            answers = talk.compare(choices, words[2] if len(words) > 2 else None)
            with writing_stdout():
                side_by_side([(_figures(answer), answer.text) for answer in answers])
        case "/system", "":
            remark(talk.system or "no instruction")
        case "/system", instruction:
            talk.system = None if instruction == "off" else instruction
            remark("no instruction" if talk.system is None else "the instruction is set; the turns so far are kept")
        case "/save", file if file:
            _save(talk, Path(file).expanduser())
        case "/open", file if file:
            _open(talk, Path(file).expanduser())
        case "/resize", size if size:
            done = resize(talk.model, size)
            remark(f"{bytes_text(done.before)} -> {bytes_text(done.after)} in {1000 * done.seconds:.0f} ms")
        case "/help", "":
            remark(COMMANDS)
        case _:
            remark(f"{text[:60]!r} is not a command, and was not said to the model\n{COMMANDS}")
    return True


def _numbers(command: str, words: list[str]) -> list[int]:
    numbers = []
    for word in words:
        try:
            numbers.append(int(word))
        except ValueError as error:
            raise UsageError(f"{command} takes a number, not {word!r}") from error
    return numbers


def _save(talk: Conversation, path: Path) -> None:
    try:
        path.write_text(json.dumps({"messages": talk.messages}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: half a surrogate, which a model may write
        raise InputError(f"{path} cannot be written: {error}") from error
    remark(f"{len(talk.messages)} messages are in {path}")


def _open(talk: Conversation, path: Path) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}", hint="/save writes such files") from error
    talk.messages = found.get("messages", found) if isinstance(found, dict) else found
    remark(f"{len(talk.messages)} messages; the last: {talk.messages[-1]['content']}" if talk.messages else "empty")


def _figures(answer: Generation) -> str:
    speed = "" if answer.tokens_per_second is None else f", {answer.tokens_per_second:.1f} tokens/s"
    empty = "" if answer.text.strip() else "; nothing but white space" if answer.text else "; an empty answer"
    return f"[{answer.precision}, {answer.tokens} tokens{speed}{empty}]"


def _precision(bits: BitsOrPlan) -> str:
    return f"{bits} bits" if isinstance(bits, int) else f"plan {bits}"


def _choice(talk: Conversation) -> str:
    """What there is to choose from."""
    return ", ".join(map(str, talk.supported)) or "one plan's pages"
