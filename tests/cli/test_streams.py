"""stdout of any encoding, closed, full, or with a reader that leaves; arguments and files that are no text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_outcome import Command
from job_process import printed

BITSTRATA = [sys.executable, "-m", "bitstrata.cli.main"]


@pytest.fixture(scope="module")
def foreign(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose folder and whose every token are beyond ASCII."""
    folder = Path(shutil.copytree(quantized, tmp_path_factory.mktemp("foreign") / "modèl"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {
        token if index < 3 else chr(0x4E00 + index): index for token, index in vocabulary.items()
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def run(*arguments: object, **settings: object) -> subprocess.CompletedProcess[bytes]:
    """The program as a user starts it, which takes seconds."""
    command = [*BITSTRATA, *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, **settings)  # type: ignore[call-overload, no-any-return]


def test_a_terminal_that_lacks_characters_gets_them_escaped(foreign: Path, tmp_path: Path) -> None:
    text = tmp_path / "tèxt.txt"
    text.write_text("".join(chr(0x4E00 + index) for index in range(3, 60)), encoding="utf-8")
    for arguments in (
        ["generate", foreign, "一丁", "--max-new-tokens", "4"],
        ["inspect", foreign],
        ["eval", foreign, "--text", text],
    ):
        shown = printed(list(map(str, arguments)), tmp_path, "utf-8")[1].decode()
        assert not shown.isascii()
        for encoding in ("ascii", "cp1252"):
            code, escaped, said = printed(list(map(str, arguments)), tmp_path, encoding)
            assert code == 0, said
            assert escaped == shown.encode(encoding, "backslashreplace")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_stdout_that_is_full_is_named(quantized: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = run("generate", quantized, "ab", "--max-new-tokens", "3", stdout=full)
    assert done.returncode == 4
    assert b"error: stdout cannot be written: No space left on device" in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_stdout_that_is_closed_is_said_and_the_work_is_done(quantized: Path) -> None:
    done = run("inspect", quantized, preexec_fn=lambda: os.close(1))
    assert done.returncode == 0
    assert b"stdout is closed, so results are not shown" in done.stderr
    assert b"Error" not in done.stderr


def test_a_reader_that_has_seen_enough_ends_a_reply(quantized: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = run("generate", quantized, "ab", "--max-new-tokens", "30", stdout=writing)
    os.close(writing)
    assert done.returncode == 0
    assert b"error" not in done.stderr


def test_names_longer_than_a_system_takes_are_input_errors(quantized: Path, text: Path, cli: Command) -> None:
    name = "x" * 300
    for arguments in (
        ["inspect", name], ["generate", name, "ab"],
        ["eval", name, "--text", text], ["eval", quantized, "--text", name],
        ["generate", quantized, "ab", "--bits", f"{name}.json"], ["plan", name, "--budget", "3bpw"],
        ["plan", quantized, "--budget", "3.5bpw", "--text", text, "--windows", 2, "--seq-len", 16, "-o", name],
    ):  # fmt: skip
        cli(*arguments).refused(3)


def test_characters_that_steer_a_terminal_are_escaped(quantized: Path, tmp_path: Path, cli: Command) -> None:
    folder = Path(shutil.copytree(quantized, tmp_path / "out"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["method"] = "\x1b]0;title\x07\x9b1m\ud800"
    (folder / "config.json").write_text(json.dumps(config))
    refused = cli("inspect", folder)
    assert refused.code == 3  # it is not as it was written
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["metadata"]["config_sha256"]
    index["weight_map"]["\x1b[2Jx.plane_0"] = "model-plane-0.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused = cli("inspect", folder)
    refused.refused(3, r"\x1b[2Jx.plane_0 is stored")
    del index["weight_map"]["\x1b[2Jx.plane_0"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    code, shown, said = printed(["inspect", str(folder)], tmp_path, "utf-8")
    assert code == 0, said
    assert rb"method \x1b]0;title\x07\x9b1m\ud800" in shown
    assert b"\x1b" not in shown
