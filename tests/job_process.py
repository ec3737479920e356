"""The command line in real processes that can be killed.

They are forked from a server that has imported everything already, so that one starts in
milliseconds instead of seconds.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["bitstrata.cli.main", "transformers.models.llama.modeling_llama"])


def arguments(model: Path, output: Path, text: Path) -> list[str]:
    """A quantize command of about a second."""
    return [
        "quantize", str(model), "-o", str(output), "--calibration", str(text), "--bits", "2-3", "--group-size", "32",
        "--num-samples", "6", "--seq-len", "32", "--option", "iterations=2", "--option", "tune_steps=4",
        "--device", "cpu",
    ]  # fmt: skip


def start(
    command: list[str],
    log: Path,
    kill_at: int | None = None,
    constants: Mapping[str, float] | None = None,
    environment: Mapping[str, str] | None = None,
) -> ForkServerProcess:
    """Run `bitstrata` with `command` in a process of its own, its output in `log`.

    kill_at: the process sends itself SIGKILL at this moment: 2 n just before its n-th file is renamed
        into place, 2 n + 1 just after.
    constants: "module.NAME" in the job's package -> what it is instead of the usual.
    environment: variables to set.
    """
    process = _CONTEXT.Process(target=_run, args=(command, str(log), kill_at, constants, environment))
    process.start()
    return process


def finish(
    command: list[str], log: Path, kill_at: int | None = None, constants: Mapping[str, float] | None = None
) -> int:
    """`start`, wait, and return the exit code; -9 if the process was killed."""
    process = start(command, log, kill_at, constants)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def printed(command: list[str], folder: Path, encoding: str | None) -> tuple[int, bytes, bytes]:
    """Run `bitstrata` with stdout and stderr in `encoding`: the exit code, and what it wrote to each.

    None: with stdout closed, as after `>&-`.
    """
    out, err = folder / "stdout", folder / "stderr"
    process = _CONTEXT.Process(target=_print, args=(command, str(out), str(err), encoding))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, out.read_bytes(), err.read_bytes()


def _print(command: list[str], out: str, err: str, encoding: str | None) -> None:
    for number, (name, path) in enumerate((("stdout", out), ("stderr", err)), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        errors = "backslashreplace" if name == "stderr" else "strict"  # as Python opens them
        setattr(sys, name, open(number, "w", encoding=encoding, errors=errors, closefd=False))  # noqa: SIM115
    if encoding is None:
        os.close(1)
        sys.stdout = None  # as Python has it then
    from bitstrata.cli.main import main

    sys.argv = ["bitstrata", *command]
    main()


def start_team(
    commands: Sequence[list[str]], logs: Path, constants: Mapping[str, float] | None = None
) -> list[ForkServerProcess]:
    """Run `bitstrata` as a launcher does, a process for each command; the output of process r is in `logs`/r."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs.mkdir(exist_ok=True)
    common = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start(
            command,
            logs / str(rank),
            constants=constants,
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, command in enumerate(commands)
    ]


def finish_team(
    commands: Sequence[list[str]], logs: Path, constants: Mapping[str, float] | None = None
) -> list[int | None]:
    """`start_team`, wait, and return the exit codes."""
    processes = start_team(commands, logs, constants)
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _run(
    command: list[str],
    log: str,
    kill_at: int | None,
    constants: Mapping[str, float] | None,
    environment: Mapping[str, str] | None,
) -> None:
    os.environ |= environment or {}
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if kill_at is not None:
        _kill_at(kill_at)
    for name, value in (constants or {}).items():
        module, _, constant = name.rpartition(".")
        place = importlib.import_module(f"bitstrata.quantization.{module}")
        assert hasattr(place, constant), name
        setattr(place, constant, value)
    from bitstrata.cli.main import main

    sys.argv = ["bitstrata", *command]
    main()


def _kill_at(moment: int) -> None:
    from bitstrata.checkpoint import writer

    replace = writer.os.replace
    now = -1

    def tick() -> None:
        nonlocal now
        now += 1
        if now == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def replace_or_die(source: str, target: str) -> None:
        tick()
        replace(source, target)
        tick()

    writer.os.replace = replace_or_die  # type: ignore[assignment]
