"""A job of several processes: the bytes of one, whoever dies is named, and the rest goes on later."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from job_helpers import digests
from job_process import arguments, finish, finish_team, start_team
from tiny_models import tiny_gpt2, tiny_mixtral

from bitstrata.errors import PreflightError, UsageError
from bitstrata.options import QuantizeOptions
from bitstrata.quantization import launch
from bitstrata.quantization.settings import Settings
from bitstrata.quantization.team import lanes_of, shared_out

SMALL = ["--bits", "2-3", "--group-size", "32", "--seq-len", "32", "--device", "cpu"]
FEW_TURNS = ["--option", "iterations=2"]
METHODS: dict[str, tuple[int, list[str]]] = {  # the number of processes, and arguments beside --calibration
    "nested-experts": (3, [*FEW_TURNS, "--num-samples", "10"]),
    "nested-tuned-head": (2, [*FEW_TURNS, "--preset", "best", "--option", "tune_steps=4", "--head-bits", "6"]),
    "nested-panels": (3, [*FEW_TURNS, "--num-samples", "2"]),  # the first process has no windows
    "nested-fast": (2, ["--preset", "fast"]),
    "gptq-transposed": (3, ["--method", "gptq", "--bits", "3"]),
    "bpdq": (2, ["--method", "bpdq", "--bits", "3"]),
    "anybcq": (2, ["--method", "anybcq", "--option", "steps=3", "--option", "rounds=2"]),
    "anyprecision": (2, ["--method", "anyprecision"]),
    "rtn": (2, ["--method", "rtn"]),
    "rtn-no-text": (5, ["--method", "rtn"]),
}


@pytest.fixture(scope="module")
def models(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By what a method's name ends in."""
    folder = tmp_path_factory.mktemp("models")
    return {"experts": tiny_mixtral(folder / "mixtral"), "transposed": tiny_gpt2(folder / "gpt2"), "": model}


@pytest.mark.parametrize("name", METHODS)
def test_the_bytes_are_those_of_one_process(name: str, models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    size, more = METHODS[name]
    source = models[next(end for end in models if name.endswith(end))]
    given = [] if name.endswith("no-text") else ["--calibration", str(text)]
    outputs = [tmp_path / "one", tmp_path / "several"]
    one, several = (
        ["quantize", str(source), "-o", str(out), *SMALL, "--num-samples", "6", *given, *more, "--json"]
        for out in outputs
    )
    constants = {"moment_sums.SUMMED": 700, "moment_sums.IN_MEMORY": 0} if name.endswith("panels") else {}
    assert finish(one, tmp_path / "log", constants=constants) == 0, (tmp_path / "log").read_text()
    codes = finish_team([several] * size, tmp_path / "logs", constants)
    assert codes == [0] * size, said(tmp_path / "logs")
    assert digests(outputs[0]) == digests(outputs[1])
    assert not (outputs[1] / ".job").exists()
    for rank in range(1, size):
        assert (tmp_path / "logs" / str(rank)).read_text() == "", "one process speaks for all"
    first = (tmp_path / "logs" / "0").read_text()
    assert json.loads(first[first.index("{") :])["output"] == str(outputs[1])


def said(logs: Path) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(logs.iterdir()))


@pytest.fixture(scope="module")
def unbroken(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("unbroken")
    assert finish(slower(model, folder / "out", text), folder / "log") == 0
    return digests(folder / "out")


def slower(model: Path, output: Path, text: Path) -> list[str]:
    """A command of a second or two, most of it in blocks."""
    return [*arguments(model, output, text), "--option", "iterations=20", "--option", "tune_steps=0"]


def wait_for(output: Path, pattern: str, is_alive: Callable[[], bool], logs: Path) -> None:
    while not list(output.glob(pattern)):
        assert is_alive(), said(logs)
        time.sleep(0.002)


@pytest.mark.parametrize(("killed", "later"), [(1, 1), (0, 3)])
def test_a_killed_process_is_named_and_another_number_goes_on(
    killed: int, later: int, model: Path, text: Path, tmp_path: Path, unbroken: dict[str, str]
) -> None:
    output, logs = tmp_path / "out", tmp_path / "logs"
    processes = start_team([slower(model, output, text)] * 2, logs)
    wait_for(output, ".job/block-0000.safetensors", processes[0].is_alive, logs)
    victim, other = processes[killed], processes[1 - killed]
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    other.join()
    assert other.exitcode == 4, said(logs)
    told = (logs / str(1 - killed)).read_text()
    assert f"error: process {killed} (cpu on " in told
    assert "run the same command again" in told
    again = tmp_path / "again"
    assert finish_team([slower(model, output, text)] * later, again) == [0] * later, said(again)
    assert "of 3 blocks are already done" in (again / "0").read_text()
    assert digests(output) == unbroken


def test_an_error_of_one_process_is_that_of_all(model: Path, text: Path, tmp_path: Path) -> None:
    """Here of the process that does not lead, which does not find its model."""
    output, logs = tmp_path / "out", tmp_path / "logs"
    commands = [arguments(model, output, text), arguments(tmp_path / "nowhere", output, text)]
    assert finish_team(commands, logs) == [3, 3], said(logs)
    assert "error: process 1 (cpu on " in (logs / "0").read_text()
    assert "nowhere" in (logs / "0").read_text()
    assert not output.exists()


def test_other_arguments_are_named_before_anything_is_read(model: Path, text: Path, tmp_path: Path) -> None:
    output, logs = tmp_path / "out", tmp_path / "logs"
    usual = arguments(model, output, text)
    assert finish_team([usual, [*usual, "--group-size", "16"]], logs) == [2, 2], said(logs)
    for rank in range(2):
        told = (logs / str(rank)).read_text()
        assert "has other arguments than process 0" in told
        assert "group_size is 32 there, 16" in told
    assert not output.exists()


def test_another_model_of_the_same_shape_is_named(
    model: Path, text: Path, tmp_path: Path, models: dict[str, Path]
) -> None:
    changed = Path(shutil.copytree(model, tmp_path / "changed"))
    weights = changed / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    output, logs = tmp_path / "out", tmp_path / "logs"
    commands = [arguments(one, output, text) for one in (model, changed)]
    assert finish_team(commands, logs) == [2, 2], said(logs)
    assert "has other input than process 0" in (logs / "0").read_text()
    assert "model_sha256.model.safetensors" in (logs / "0").read_text()
    assert not output.exists()


def test_a_folder_that_is_not_shared_is_named(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = tmp_path / "logs"
    outputs = [tmp_path / "here" / "out", tmp_path / "there" / "out"]
    for output in outputs:
        output.parent.mkdir()
    assert finish_team([arguments(model, output, text) for output in outputs], logs) == [2, 2], said(logs)
    assert "is not the folder of that name of process 1" in (logs / "0").read_text()
    assert "all processes need one folder" in (logs / "0").read_text()
    assert not outputs[1].exists()


def test_devices_and_a_launcher_together_are_refused(model: Path, text: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    command = [*arguments(model, tmp_path / "out", text)[:-2], "--devices", "cpu,cpu"]
    assert finish_team([command] * 2, logs) == [2, 2]
    assert "a launcher has started 2 already" in (logs / "0").read_text()


@pytest.mark.parametrize(
    ("devices", "named"),
    [
        ("cpu," * 8 + "cpu", "9 processes were asked for"),
        ("cpu,cuda:0", "CPUs and GPUs do not make the same numbers"),
        ("cuda:0,cuda:0", "cuda:0 is there twice"),
        ("cuda,cuda:1", "does not say which GPU"),
        ("cpu,abacus", "'abacus' is not a device"),
        ("", "names no device"),
        (3, "'3' is not a device"),
    ],
)
def test_devices_that_make_no_team_are_named(devices: Any, named: str) -> None:
    with pytest.raises(PreflightError, match=named) as caught:
        Settings.parse(QuantizeOptions("model", "out", method="rtn", devices=devices))
    assert caught.value.exit_code == 2
    assert all(problem.hint for problem in caught.value.problems)


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(PreflightError, match=r"cuda:9 was asked for, but the last GPU here is cuda:1"):
        Settings.parse(QuantizeOptions("model", "out", method="rtn", devices="cuda:0,cuda:9"))
    settings = Settings.parse(QuantizeOptions("model", "out", method="rtn", devices="cuda:0,cuda:1"))
    assert [str(device) for device in settings.devices] == ["cuda:0", "cuda:1"]
    assert str(settings.device) == "cuda:0"
    with pytest.raises(PreflightError, match="--device and --devices"):
        Settings.parse(QuantizeOptions("model", "out", method="rtn", device="cpu", devices="cpu,cpu"))
    one = Settings.parse(QuantizeOptions("model", "out", method="rtn", devices=["cuda:1"]))
    assert (str(one.device), one.devices) == ("cuda:1", ())


def test_a_launcher_gives_each_process_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    for name, value in {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    settings = launch.placed(Settings.parse(QuantizeOptions("model", "out", method="rtn", device="cuda")))
    assert (str(settings.device), settings.processes, settings.here) == ("cuda:3", 8, 4)
    monkeypatch.setenv("WORLD_SIZE", "9")
    settings = Settings.parse(QuantizeOptions("model", "out", method="rtn", device="cpu"))
    with pytest.raises(UsageError, match="9 processes"), launch.joined(settings):
        pass


def test_work_is_shared_out_evenly_and_always_in_the_same_way() -> None:
    assert shared_out([1.0, 1.0, 3.0, 1.0], 2) == [1, 1, 0, 1]
    assert shared_out([5.0], 3) == [0]
    assert shared_out([], 3) == []
    costs = [float(3 + index % 4) for index in range(40)]
    owners = shared_out(costs, 8)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(8)]
    assert max(loads) - min(loads) <= max(costs)
    for size in range(1, 9):
        parts = [lanes_of(rank, size) for rank in range(size)]
        assert [parts[0][0], *(end for _, end in parts)] == [start for start, _ in parts] + [8]
        assert all(start < end for start, end in parts)


@pytest.mark.parametrize(
    ("victim", "number", "code"),
    [("member", signal.SIGKILL, 4), pytest.param("leader", signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_processes_started_for_devices(
    victim: str, number: int, code: int, model: Path, text: Path, tmp_path: Path, unbroken: dict[str, str]
) -> None:
    """The program as a user starts it: one process is stopped, which ends both; then both are left alone."""
    output, log = tmp_path / "out", tmp_path / "logs" / "stderr"
    log.parent.mkdir()
    command = [sys.executable, "-m", "bitstrata.cli.main", *slower(model, output, text)]
    command[command.index("--device")] = "--devices"
    command[command.index("cpu")] = "cpu,cpu"
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
    wait_for(output, ".job/block-*.safetensors", lambda: process.poll() is None, log.parent)
    (member,) = psutil.Process(process.pid).children()
    (process if victim == "leader" else member).send_signal(number)
    assert process.wait() == code, log.read_text()
    assert ("interrupted" if victim == "leader" else "process 1 (cpu on ") in log.read_text()
    assert psutil.wait_procs([member], 10)[1] == []
    subprocess.run(command, check=True, capture_output=True)
    assert digests(output) == unbroken
