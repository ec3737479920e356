"""The `bitstrata` program: collects the verbs, turns errors into messages and exit codes.

Exit codes: 0 done, 2 usage, 3 bad input, 4 out of memory or disk, 5 a check failed, 130 interrupted.
Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback

import typer

from ..errors import BitstrataError
from ..version import __version__
from .commands import VERBS, command
from .output import open_streams
from .terminal import printable, shown_on_stderr

# what typer raises for a wrong command line: click's class or, in newer versions, typer's copy of it
_CommandLineError: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)

INTERRUPTED = 130

app = typer.Typer(
    name="bitstrata",
    help="Quantize a causal LM once into nested bit-planes; run it at any number of bits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        typer.echo(f"bitstrata {__version__}")
        raise typer.Exit


for _name, (_options_of, _target) in VERBS.items():
    app.command(_name)(command(_options_of, _target))


def main() -> None:
    """Entry point of the `bitstrata` script."""
    open_streams()
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]  # accepted before and after the verb
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # ours is the only bar
    sys.exit(run(arguments, debug=debug))


def run(arguments: list[str], *, debug: bool = False) -> int:
    """Run the program with `arguments` and return its exit code."""
    try:
        with shown_on_stderr():
            code = app(arguments, standalone_mode=False, prog_name="bitstrata")
        if code == INTERRUPTED:  # newer versions of typer make this of it
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except typer.Exit as leave:
        return leave.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted")
        return INTERRUPTED
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 1
    except _CommandLineError as error:
        error.show()  # type: ignore[attr-defined]
        return 2
    except BaseException as error:
        if debug:
            traceback.print_exc()
        return _explain(error, arguments)


def _explain(error: BaseException, arguments: list[str]) -> int:
    if isinstance(error, BitstrataError):
        _say(f"error: {error.message}")
        if error.hint:
            _say(f"hint: {error.hint}")
        return error.exit_code
    from ..memory import is_out_of_memory  # torch, which --help does without

    if is_out_of_memory(error):
        _say("error: out of memory")
        _say("hint: lower --num-samples or --seq-len, or use a machine with more memory")
        return 4
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        _say(f"error: the disk is full: {error.filename or error}")
        _say("hint: free some space and run the same command again")
        return 4
    if isinstance(error, OSError) and error.filename is not None:
        _say(f"error: {error.filename}: {error.strerror}")
        _say("hint: check the path")
        return 3
    halves = [argument for argument in arguments if not _is_text(argument)]
    if isinstance(error, UnicodeError) and halves:
        _say(f"error: the argument {halves[0]!r} is not {sys.getfilesystemencoding()} text")
        _say("hint: give it in that encoding; a file of such a name has to be renamed")
        return 2
    _say(f"error: {type(error).__name__}: {error}")
    _say("hint: this is a bug in bitstrata; run again with --debug and report the traceback")
    return 1


def _is_text(argument: str) -> bool:
    """Whether it was text on the command line: Python keeps bytes that are none as halves of characters."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def _say(message: str) -> None:
    typer.echo(printable(message), err=True)


if __name__ == "__main__":
    main()
