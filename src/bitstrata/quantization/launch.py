"""How the processes of a job come together: started here, one for each of `--devices`, or by a launcher.

Started here, the calling process leads. The others read what to do from a pipe that stays open: it ends when the leader
ends, however that happens, and so do they. They take no interrupts from the keyboard; the leader does.

A launcher such as torchrun starts the same command in every process and says in the environment who is who (RANK,
WORLD_SIZE, MASTER_ADDR, MASTER_PORT; LOCAL_RANK chooses the GPU).
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from ..errors import ProcessError, UsageError, disk_errors
from ..models.load import pick_device
from ..progress import log
from ..version import __version__
from .context import Prepared
from .settings import Settings
from .state import JOB_FOLDER, JobState, differences
from .team import AGAIN, Team, Together, check_size

MEMBER = "bitstrata.quantization.member"
FOREVER = datetime.timedelta(days=365)  # of an exchange: others may be busy, and a connection breaks by itself
MEETING = datetime.timedelta(minutes=5)  # until all processes have to be there
LEAVING = 5.0  # seconds until a process that was told to end is made to
MARK = f"{JOB_FOLDER}/team"  # below the output: tells whether all see the same folder
SEEN = 10.0  # seconds until it has to be seen
READY = "ready"  # key of the store, with a rank behind


@contextlib.contextmanager
def joined(settings: Settings) -> Iterator[Team]:
    """The team that a launcher has made of this process and others; a process that is alone without a launcher.

    Raises UsageError if the processes were not given the same command, or have no devices that go together;
    ProcessError if some do not appear.
    """
    size = _launched()
    if size == 1:
        yield Team()
        return
    check_size(size)
    if settings.devices:
        raise UsageError(
            f"--devices starts processes, and a launcher has started {size} already (WORLD_SIZE)",
            hint="leave --devices out; each process takes the GPU of its LOCAL_RANK",
        )
    rank = int(os.environ["RANK"])
    with _silent(rank), contextlib.ExitStack() as stack:
        log.info(f"waiting for {size} processes, as a launcher says (WORLD_SIZE)")
        try:
            store, rank, size = next(rendezvous("env://", timeout=MEETING))
            stack.enter_context(_group(store, rank, size, settings.device))
        except (RuntimeError, ValueError) as error:
            raise ProcessError(
                f"the {size} processes of the launcher did not come together: {error}",
                hint="start all of them; without a launcher, unset WORLD_SIZE",
            ) from error
        team = Together(rank, size, store, settings.device, control=_control_group(settings.device))
        stack.enter_context(_telling(team))
        team.introduce(socket.gethostname())
        team.agree("versions", versions(), differences)
        team.agree("arguments", settings.fingerprint(), differences)
        yield team


def versions() -> dict[str, str]:
    """What has to be the same in all processes."""
    return {"bitstrata": __version__, "torch": torch.__version__, "python": sys.version.split()[0]}


def placed(settings: Settings) -> Settings:
    """`settings` with the number of processes, and with this one's own GPU where a launcher has started it."""
    if settings.devices:
        return replace(settings, processes=len(settings.devices), here=len(settings.devices))
    size = _launched()
    if size == 1:
        return settings
    here, device = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), settings.device
    if device.type == "cuda" and device.index is None:
        device = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    return replace(settings, processes=size, here=here, device=device)


def _launched() -> int:
    """How many processes a launcher has started."""
    size = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
    return int(size) if size.isdecimal() else 1


@contextlib.contextmanager
def own_threads(settings: Settings) -> Iterator[None]:
    """With as many threads as each process of `--devices` gets, so that what is measured here is the speed of one."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // max(1, len(settings.devices))))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def started(settings: Settings) -> Iterator[Team]:
    """A team of this process, which leads, and one new process for each further device, with as many threads each."""
    size = len(settings.devices)
    store = TCPStore("127.0.0.1", 0, size, True, MEETING, wait_for_workers=False)
    with contextlib.ExitStack() as stack:
        members = _Members(settings, store.port, torch.get_num_threads())
        stack.callback(members.end)
        members.await_all(store)
        stack.enter_context(_group(store, 0, size, settings.device))
        control = _control_group(settings.device)
        team = Together(0, size, store, settings.device, members.ended, control)
        stack.enter_context(_telling(team))
        team.introduce(socket.gethostname())
        log.info(f"{size} processes: {', '.join(team.names)}")
        yield team
        members.finish()


class _Members:
    """The processes that were started."""

    def __init__(self, settings: Settings, port: int, threads: int) -> None:
        self._messages: list[IO[bytes]] = []  # what each writes to stderr
        self._processes: list[subprocess.Popen[bytes]] = []
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(sys.path)}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        try:
            for rank, device in enumerate(settings.devices[1:], 1):
                told = {
                    "rank": rank,
                    "port": port,
                    "threads": threads,
                    "settings": replace(settings, device=device, here=1),
                }
                self._start(pickle.dumps(told), environment)
        except BaseException:
            self.end()
            raise

    def _start(self, told: bytes, environment: Mapping[str, str]) -> None:
        messages = tempfile.TemporaryFile()  # noqa: SIM115  (closed at the end)
        process = subprocess.Popen(
            [sys.executable, "-m", MEMBER],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=messages,
            env=environment,
        )
        self._messages.append(messages)
        self._processes.append(process)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already, which is seen later
            process.stdin.write(len(told).to_bytes(8, "little") + told)
            process.stdin.flush()

    def ended(self, rank: int) -> str | None:
        """How the process of this rank ended; None while it runs, and of the leader."""
        code = None if rank == 0 else self._processes[rank - 1].poll()
        if code is None:
            return None
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            return f"was killed ({name})" + ("; memory may have run out" if name == "SIGKILL" else "")
        messages = self._messages[rank - 1]
        messages.seek(0)
        lines = messages.read().decode(errors="replace").strip().splitlines()
        return f"ended early (exit code {code})" + (f": {lines[-1].strip()}" if lines else "")

    def await_all(self, store: Any) -> None:
        """Until all have started. Raises ProcessError if one ends before."""
        until = time.monotonic() + MEETING.total_seconds()
        for rank in range(1, len(self._processes) + 1):
            while not store.check([f"{READY}/{rank}"]):
                how = self.ended(rank)
                if how is None and time.monotonic() > until:
                    how = "did not start in time"
                if how is not None:
                    raise ProcessError(f"process {rank} {how}", hint=AGAIN)
                time.sleep(0.05)

    def finish(self) -> None:
        """Wait until they have ended by themselves."""
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LEAVING)

    def end(self) -> None:
        """End them now, those that still run."""
        for process in self._processes:
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
        for process in self._processes:
            try:
                process.wait(LEAVING)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for messages in self._messages:
            messages.close()


@contextlib.contextmanager
def entered(source: IO[bytes]) -> Iterator[tuple[Team, Settings]]:
    """In a process that `started` has made: the team, and what to do, from the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the leader takes it
    length = int.from_bytes(source.read(8), "little")
    told = pickle.loads(source.read(length))
    threading.Thread(target=_end_with, args=(source,), daemon=True).start()
    settings: Settings = told["settings"]
    rank, size = told["rank"], len(settings.devices)
    torch.set_num_threads(told["threads"])
    store = TCPStore("127.0.0.1", told["port"], size, False, MEETING)
    with _silent(rank), _group(store, rank, size, settings.device):
        team = Together(rank, size, store, settings.device, control=_control_group(settings.device))
        with _telling(team):
            team.introduce(socket.gethostname())
            yield team, settings


def _end_with(source: IO[bytes]) -> None:
    """End this process when the other end of the pipe is closed."""
    source.read()
    os._exit(1)


def opened(prepared: Prepared, team: Team) -> JobState:
    """The job folder: the leader has it, the others read what is there.

    Raises JobError if the folder holds something else; UsageError if not all processes see the same one.
    """
    output, rest = prepared.settings.output, (prepared.fingerprint, prepared.spec())
    if team.size == 1:
        return JobState(output, *rest)
    own = [JobState(output, *rest)] if team.leads else []
    token = team.led(lambda: _marked(output))
    seen = team.everyone(_sees(output, token))
    team.led(lambda: (output / MARK).unlink())
    if not all(seen):
        names = ", ".join(team.names[rank] for rank, one in enumerate(seen) if not one)
        if own:
            own[0].close()
        raise UsageError(
            f"{output} of {team.names[0]} is not the folder of that name of {names}",
            hint="all processes need one folder for -o, such as a network file system's",
        )
    return own[0] if own else JobState(output, *rest, rank=team.rank)


def _marked(output: Path) -> str:
    token = secrets.token_hex(16)
    with disk_errors(output / MARK):
        (output / MARK).write_text(token)
    return token


def _sees(output: Path, token: str) -> bool:
    """Whether the mark is there, or comes soon: a network's folder may need a moment."""
    until = time.monotonic() + SEEN
    while True:
        with contextlib.suppress(OSError):
            if (output / MARK).read_text() == token:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


@contextlib.contextmanager
def _group(store: Any, rank: int, size: int, device: torch.device) -> Iterator[None]:
    """torch's default group of these processes, while this lasts; the caller's own where there is one."""
    if dist.is_initialized():
        if dist.get_world_size() != size or dist.get_rank() != rank:
            raise UsageError(
                "this process is in another group of torch.distributed already",
                hint="end that with torch.distributed.destroy_process_group()",
            )
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store.set(f"{READY}/{rank}", "")
    store.wait([f"{READY}/{other}" for other in range(size)], MEETING)
    backend, own = "nccl" if device.type == "cuda" else "gloo", PrefixStore("bitstrata", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=FOREVER)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _control_group(device: torch.device) -> Any:
    """All processes over gloo."""
    return dist.new_group(backend="gloo", timeout=FOREVER) if device.type == "cuda" else None


@contextlib.contextmanager
def _telling(team: Together) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        team.tell(error)
        raise


@contextlib.contextmanager
def _silent(rank: int) -> Iterator[None]:
    """Only the leader logs."""
    before, log.disabled = log.disabled, log.disabled or rank > 0
    try:
        yield
    finally:
        log.disabled = before
