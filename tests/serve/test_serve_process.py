"""The real command as a process: how it starts, says where it is, and ends under load; and what it refuses to start."""

from __future__ import annotations

import ast
import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from http_calls import CHAT, COMPLETIONS, JSON, WAIT, events, eventually, read_all, send
from served import serve

import bitstrata
from bitstrata.checkpoint import CheckpointReader, Fingerprint
from bitstrata.cli.main import run
from bitstrata.plans import Plan

LONG = {"prompt": "import os\n", "max_tokens": 900, "ignore_eos": True}


@dataclass
class Process:
    """A `bitstrata serve` that is ready."""

    child: subprocess.Popen[str]
    port: int
    said: list[str]

    def get(self, path: str, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        try:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def running(self) -> int:
        found = re.search(rb"^bitstrata_requests_running (\d+)", self.get("/metrics")[1], re.M)
        assert found is not None
        return int(found[1])

    def end(self) -> int:
        return self.child.wait(WAIT)


@pytest.fixture(scope="module")
def start(checkpoint):
    """start(*arguments) -> a process, once it takes requests; those still running at the end are killed."""
    children = []

    def begin(*arguments: str, **environment: str) -> Process:
        child, said = serve(checkpoint, *arguments, wait=WAIT, **environment)
        children.append(child)
        found = re.search(
            r"serving small at http://127\.0\.0\.1:(\d+)/v1 with bits 2, 3, 4 \((\d) by default\)", said[-1]
        )
        assert found is not None, said
        return Process(child, int(found[1]), said)

    yield begin
    for child in children:
        child.kill()
        child.wait()


@pytest.fixture(scope="module")
def processes(start):
    """Three at once, because each takes seconds to start."""
    with ThreadPoolExecutor(3) as pool:
        patient = pool.submit(start, "--bits", "3", "--allowed-host", "Models.example", BITSTRATA_API_KEY="k")
        hasty = pool.submit(start, "--grace", "0.3")
        stubborn = pool.submit(start, "--grace", "60")
        return patient.result(), hasty.result(), stubborn.result()


def test_sigterm_lets_what_is_under_way_finish(processes):
    process, _, _ = processes
    key = {"Authorization": "Bearer k"}
    assert process.get("/health") == (200, b'{"status":"ok"}')
    assert process.get("/v1/models")[0] == 401
    assert [process.get("/health", Host=host)[0] for host in ("models.example", "evil.example")] == [200, 403]
    models = json.loads(process.get("/v1/models", **key)[1])["data"]
    assert (models[0]["id"], models[0]["bits"]) == ("small", 3)

    def ask(number: int) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=WAIT)
        body = {**LONG, "max_tokens": 400, "stream": number % 2 == 0}
        connection.request("POST", COMPLETIONS, json.dumps(body), {**JSON, **key})
        started.release()
        answer = connection.getresponse()
        data = answer.status, answer.read()
        connection.close()
        return data

    started = threading.Semaphore(0)
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, number) for number in range(6)]
        for _ in asked:
            started.acquire()
        count = re.compile(rb"^bitstrata_requests_running 6", re.M)
        eventually(lambda: bool(count.search(process.get("/metrics", **key)[1])), "six running requests")
        process.child.send_signal(signal.SIGTERM)
        eventually(lambda: process.get("/health")[0] == 503, "a closing server")
        late = http.client.HTTPConnection("127.0.0.1", process.port, timeout=WAIT)
        late.request("POST", COMPLETIONS, json.dumps(LONG), {**JSON, **key})
        refused = late.getresponse()
        assert (refused.status, json.loads(refused.read())["error"]["code"]) == (503, "closing")
        late.close()
        answers = [future.result() for future in asked]
    for number, (status, data) in enumerate(answers):
        assert status == 200
        if number % 2 == 0:
            *chunks, done = events(data)
            assert done == "[DONE]"
            assert json.loads(chunks[-1])["choices"][0]["finish_reason"] == "length"
        else:
            usage = json.loads(data)["usage"]
            del usage["prompt_tokens_details"]  # of equal prompts some may be copied from others
            assert usage | {"prompt_tokens": 0, "total_tokens": 0} == {
                "prompt_tokens": 0,
                "total_tokens": 0,
                "completion_tokens": 400,
                "bits": {"3": 400},
            }
    assert process.end() == 0
    assert any("closing: 6 requests may finish within 30 s" in line for line in process.said)


def test_after_the_grace_the_rest_is_cancelled_and_told(processes):
    _, process, _ = processes
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1000, "ignore_eos": True, "stream": True}
    streamed = send(process.port, CHAT, chat)
    whole = send(process.port, COMPLETIONS, {**LONG, "n": 3})
    eventually(lambda: process.running() == 4, "four running requests")
    process.child.send_signal(signal.SIGINT)
    *_, error, done = events(read_all(streamed))
    assert done == "[DONE]"
    assert json.loads(error)["error"]["code"] == "closing"
    assert b"503 Service Unavailable" in whole.recv(65536)
    assert process.end() == 0
    assert any("2 cancelled" in line for line in process.said)


def test_a_second_signal_ends_it_at_once(processes):
    _, _, process = processes
    connection = send(process.port, COMPLETIONS, {**LONG, "n": 4})
    eventually(lambda: process.running() == 4, "four running requests")
    process.child.send_signal(signal.SIGTERM)
    eventually(lambda: process.get("/health")[0] == 503, "a closing server")
    process.child.send_signal(signal.SIGTERM)
    assert process.end() == 128 + signal.SIGTERM
    connection.close()


def refused(capfd, code: int, *said: str, arguments: list[str]) -> None:
    capfd.readouterr()
    assert run(["serve", *arguments]) == code
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert "hint: " in printed.err
    for part in said:
        assert part in printed.err


def test_what_cannot_be_served_is_said_before_the_model_is_loaded(checkpoint, capfd, monkeypatch, tmp_path):
    with monkeypatch.context() as patched:

        def load(*_, **__):
            raise AssertionError("the model was loaded")

        patched.setattr("bitstrata.cli.serve.load_sized", load)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            refused(capfd, 2, "in use", "--port", arguments=[str(checkpoint), "--port", port])
        refused(capfd, 2, "cannot serve at", arguments=[str(checkpoint), "--host", "no.such.host.invalid"])
        refused(capfd, 2, "API key", arguments=[str(checkpoint), "--api-key", ""])
        refused(capfd, 2, "policy", "load, position", arguments=[str(checkpoint), "--policy", "hope"])
        free = [str(checkpoint), "--port", "0"]
        mixed, foreign = tmp_path / "mixed.json", tmp_path / "foreign.json"
        plan = Plan.uniform(CheckpointReader(checkpoint).spec, 3)
        plan.save(mixed)
        replace(plan, model=Fingerprint(layout="0" * 64)).save(foreign)
        refused(capfd, 2, "NAME=FILE", arguments=[str(checkpoint), "--plan", f"3={mixed}"])
        twice = ["--plan", f"small={mixed}", "--plan", f"small={foreign}"]
        refused(capfd, 2, "two plans called 'small'", arguments=[str(checkpoint), *twice])
        refused(capfd, 2, "given twice", arguments=[f"{checkpoint}:3", "--plan", f"small={mixed}", "--bits", "small"])
        refused(capfd, 3, "another model", arguments=[str(checkpoint), "--port", "0", "--plan", f"small={foreign}"])
        refused(capfd, 2, "bits", arguments=[str(checkpoint), "--plan", f"small={mixed}", "--bits", "large"])
        refused(capfd, 3, "no-such.json", arguments=[str(checkpoint), "--plan", "small=no-such.json"])
        refused(capfd, 2, "one plan's pages", arguments=[str(checkpoint), "--fit", "--min-bits", "2"])
        refused(capfd, 2, "given twice", arguments=[f"{checkpoint}:3", "--bits", "2"])
        refused(
            capfd, 2, "not Unicode text", "--served-model-name", arguments=[*free, "--served-model-name", "caf\udce9"]
        )
        refused(capfd, 2, "--allowed-host", arguments=[*free, "--allowed-host", "http://a.example"])
        named = tmp_path / os.fsdecode(b"caf\xe9")
        shutil.copytree(checkpoint, named)
        refused(capfd, 3, "not UTF-8", arguments=[str(named), "--port", "0"])
        patched.setattr(importlib.util, "find_spec", lambda _: None)
        refused(capfd, 2, "fastapi", "pip install 'bitstrata[serve]'", arguments=[str(checkpoint)])


@pytest.mark.parametrize(
    ("arguments", "hosts"),
    [
        (["--host", "127.0.0.1"], ()),
        (["--host", "0.0.0.0"], ("*",)),
        (
            ["--host", "0.0.0.0", "--allowed-host", "a.example", "--allowed-host", "b.example"],
            ("a.example", "b.example"),
        ),
    ],
)
def test_names_are_asked_for_where_only_this_machine_is_served(checkpoint, capfd, monkeypatch, arguments, hosts):
    served = []
    monkeypatch.setattr(
        "bitstrata.serve.process.serve", lambda app, *_, **__: served.append(app.state.service.settings)
    )
    monkeypatch.setattr("bitstrata.serve.process.most_requests", lambda wanted: min(wanted, 300))
    assert run(["serve", str(checkpoint), "--port", "0", *arguments]) == 0
    assert [(settings.allowed_hosts, settings.max_connections) for settings in served] == [(hosts, 300)]
    assert "max-connections lowered from 512 to 300" in capfd.readouterr().err


def test_what_the_model_or_the_engine_cannot_do(checkpoint, capfd, tmp_path):
    refused(capfd, 3, "no-model", arguments=[str(tmp_path / "no-model"), "--port", "0"])
    refused(capfd, 2, "supported bits: 2, 3, 4", arguments=[str(checkpoint), "--port", "0", "--bits", "8"])
    huge = [str(checkpoint), "--port", "0", "--cache-tokens", "3000000000"]
    refused(capfd, 4, "no memory for keys and values of 3000000000 tokens", "--cache-tokens", arguments=huge)
    refused(capfd, 2, "cache_tokens=8", arguments=[str(checkpoint), "--port", "0", "--cache-tokens", "8"])


EXTRA = {"fastapi", "uvicorn", "starlette", "prometheus_client", "llguidance"}


def top_level_imports(path: Path) -> set[str]:
    """Packages that importing a module imports; `serve` for bitstrata.serve's own modules."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_nothing_but_the_server_needs_the_extra():
    """The verb imports it only when it runs, after it has looked whether it is there. vLLM brings its own."""
    source = Path(bitstrata.__file__).parent
    for path in source.rglob("*.py"):
        if path.parent.name not in ("serve", "vllm"):
            assert not top_level_imports(path) & {*EXTRA, "serve"} or path.name == "main.py", path
    assert not top_level_imports(source / "serve" / "__init__.py") & EXTRA
    assert top_level_imports(source / "serve" / "app.py") & EXTRA, "the walk sees nothing"


def test_an_end_of_text_that_only_the_tokenizer_knows_is_noted(checkpoint, capfd, monkeypatch, tmp_path):
    monkeypatch.setattr("bitstrata.serve.process.serve", lambda *_, **__: None)
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    for name in ("config.json", "generation_config.json"):
        path = other / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 7}))
    for folder, noted in ((checkpoint, False), (other, True)):
        capfd.readouterr()
        assert run(["serve", str(folder), "--port", "0"]) == 0
        assert ("the tokenizer's end of text, <|endoftext|> (0), is not among" in capfd.readouterr().err) is noted
