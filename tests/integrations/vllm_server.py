"""A vLLM server as a user starts it, and what one asks of it over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REQUESTS = "bitstrata.integrations.vllm.requests:RequestBits"
SCHEDULER = "bitstrata.integrations.vllm.scheduler.BitsScheduler"
NAMES = "bitstrata.integrations.vllm.names.ModelNames"
EAGER = "--enforce-eager"
PER_REQUEST = ("--logits-processors", REQUESTS, "--scheduler-cls", SCHEDULER)
SMALL_BLOCKS = ("--block-size", "32")
ONE_THREAD = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}  # a worker, on however few cores there are
# A later stage has nowhere to put what it receives before a warm-up, which vLLM skips where nothing is compiled.
TRACED = ("--compilation-config", '{"mode": 2, "backend": "eager"}')
WARMED_UP = {"VLLM_CPU_CI_ENV": "0", "VLLM_CPU_KVCACHE_SPACE": None}
START_LIMIT = 400  # seconds: three processes import torch and vLLM, one after the other, on a busy machine


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def command(model: Path, *flags: str) -> list[str]:
    program = Path(sys.executable).with_name("vllm")
    return [str(program), "serve", str(model), "--dtype", "float32", "--max-model-len", "256", *flags]


def environment(more: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """Of a server; a variable that is None in `more` is not set."""
    own = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1", "VLLM_NO_USAGE_STATS": "1"}
    kept = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}  # vLLM binds threads itself
    return {key: value for key, value in {**kept, **own, **(more or {})}.items() if value is not None}


class Server:
    """Answers of one running server."""

    def __init__(self, port: int, model: str, log: Path) -> None:
        self.address, self.model, self.log = f"http://127.0.0.1:{port}", model, log

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and answer."""
        data = json.dumps({"model": self.model, **body}).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def stream(self, path: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The events of an answer that comes in pieces."""
        data = json.dumps({"model": self.model, "stream": True, **body}).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            lines = [line.decode().strip() for line in answer]
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert events.pop() == "[DONE]"
        return [json.loads(event) for event in events]

    def tokens(self, prompt: Sequence[int], count: int, bits: int | str | None, **more: Any) -> list[int]:
        """The `count` tokens after `prompt`, greedily, at `bits`, or by a plan of that name."""
        body = {"prompt": list(prompt), "max_tokens": count, "temperature": 0, "ignore_eos": True, **more}
        if bits is not None:
            body["vllm_xargs"] = {"plan" if isinstance(bits, str) else "bits": bits}
        status, answer = self.post("/v1/completions", {"return_token_ids": True, **body})
        assert status == 200, answer
        found: list[int] = answer["choices"][0]["token_ids"]
        return found

    def many(self, cases: Sequence[tuple[Sequence[int], int | str | None]], count: int) -> list[list[int]]:
        """`tokens` of all cases (prompt, bits), asked for at the same time."""
        with ThreadPoolExecutor(len(cases)) as pool:
            return list(pool.map(lambda case: self.tokens(case[0], count, case[1]), cases))

    def metric(self, name: str, label: str = "") -> float:
        """The sum of one of the server's counters, of the series that have `label`."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{") and label in line)


@contextmanager
def serving(
    model: Path, log: Path, *flags: str, env: Mapping[str, str | None] | None = None, name: str | None = None
) -> Iterator[Server]:
    """A server of `model`, up, which serves it under `name` or its path; its processes end with the block.

    AssertionError with its log if it does not start.
    """
    port = free_port()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command(model, "--port", str(port), *flags),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(env),
            start_new_session=True,
        )
    try:
        end = time.monotonic() + START_LIMIT
        while True:
            assert process.poll() is None, f"the server ended:\n{log.read_text(errors='replace')[-6000:]}"
            assert time.monotonic() < end, f"the server is not up:\n{log.read_text(errors='replace')[-6000:]}"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield Server(port, name or str(model), log)
    finally:
        _end(process)


def refusal(model: Path, *flags: str, env: Mapping[str, str | None] | None = None) -> str:
    """What a server prints that does not start. AssertionError if it does not end by itself."""
    process = subprocess.Popen(
        command(model, "--port", str(free_port()), *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(env),
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=START_LIMIT)
    finally:
        _end(process)
    assert process.returncode != 0
    return output.decode(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    """The server and the processes that it started: they are of one session of their own."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            continue
