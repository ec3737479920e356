"""`bitstrata chat`."""

from __future__ import annotations

import io
import sys
from dataclasses import fields

import typer
from transformers import TextStreamer

from ..errors import BitstrataError, UsageError
from ..models import load_tokenizer, resolve
from ..nn import BitsOrPlan
from ..options import ChatCommand, GenerationSettings
from ..plans import bytes_text, choose_bits, resize
from ..runtime import Conversation
from .sizing import load_sized

COMMANDS = """/bits N       answer at N bits from now on; /bits alone says what there is
/resize SIZE  with --budget or --fit: hold this much from now on, say 400MB, 3.2bpw or plan.json
/reset        forget the conversation
/help         these lines
/quit         leave; so does the end of input
Ctrl-C        ends a reply"""


def run(options: ChatCommand) -> None:
    target, chosen = choose_bits(options.model, options.bits)
    loaded = load_sized(target, chosen, options, context=None)
    tokenizer = load_tokenizer(resolve(target, weights=False))
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
    kind = "" if talk.has_template else "; the tokenizer has no chat template, so the model continues your text"
    _say(f"{_precision(talk.bits)} of {_choice(talk)}{kind}; /help lists commands")
    while (line := _read()) is not None:
        if not line.strip():
            continue
        if line.startswith("/"):
            if not _obey(talk, line.split()):
                return
            continue
        try:
            result = talk.reply(line, TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
        except BitstrataError as error:
            _say(f"{error.sentence}; /reset forgets the conversation")
            continue
        except KeyboardInterrupt:
            _say("stopped; this turn is forgotten")
            continue
        speed = "" if result.tokens_per_second is None else f", {result.tokens_per_second:.1f} tokens/s"
        _say(f"[{_precision(talk.bits)}, {result.tokens} tokens{speed}]")


def _read() -> str | None:
    """A line from the user; None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _obey(talk: Conversation, words: list[str]) -> bool:
    """Whether to go on after a command."""
    match words:
        case ["/quit" | "/exit"]:
            return False
        case ["/reset"]:
            talk.reset()
            _say("forgotten")
        case ["/bits"]:
            _say(f"{_precision(talk.bits)} of {_choice(talk)}")
        case ["/bits", value]:
            try:
                talk.bits = int(value)
                _say(_precision(talk.bits))
            except BitstrataError as error:  # before ValueError: unsupported bits are one
                _say(error.sentence)
            except ValueError:
                _say(f"/bits takes a number, not {value!r}")
        case ["/resize", size]:
            try:
                done = resize(talk.model, size)
                _say(f"{bytes_text(done.before)} -> {bytes_text(done.after)} in {1000 * done.seconds:.0f} ms")
            except BitstrataError as error:
                _say(error.sentence)
        case _:
            _say(COMMANDS)
    return True


def _precision(bits: BitsOrPlan) -> str:
    return f"{bits} bits" if isinstance(bits, int) else f"plan {bits}"


def _choice(talk: Conversation) -> str:
    """What there is to choose from."""
    return ", ".join(map(str, talk.supported)) or "one plan's pages"


def _say(text: str) -> None:
    typer.echo(text, err=True)
