"""`--policy` and `--min-bits` of the verbs that make one text."""

from __future__ import annotations

import importlib
import io
import json
from pathlib import Path

import pytest
from cli_outcome import Command


def test_generate_counts_its_tokens_by_bits(quantized: Path, cli: Command) -> None:
    arguments = ("--policy", "position:tokens=5", "--min-bits", 3, "--max-new-tokens", 12)
    done = cli("generate", quantized, "the ", *arguments, "--json")
    assert done.code == 0, done.err
    counted = json.loads(done.out)["tokens_by_bits"]
    assert counted["4"] == 5
    assert counted.keys() == {"3", "4"}
    assert f"[3 to 4 bits ({counted['3']} at 3, 5 at 4)" in cli("generate", quantized, "the ", *arguments).err


def test_a_chat_says_at_what_bits_it_answered(quantized: Path, cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the cat\n/bits 2\nthe cat\n")))
    done = cli("chat", quantized, "--policy", "position:tokens=3", "--max-new-tokens", 9, "--temperature", 0)
    assert done.code == 0, done.err
    assert "[2 to 4 bits (" in done.err
    assert "[2 bits, " in done.err


@pytest.mark.parametrize("verb", ["generate", "chat"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "load:target_ms=5"), "looks at many requests"),
        (("--policy", "structures"), "is not known"),
        (("--policy", "structure:prose=9"), "cannot be used"),
        (("--min-bits", 2), "needs a policy"),
    ],
    ids=["load", "unknown", "no bits", "no policy"],
)
def test_what_cannot_be_is_refused_before_a_model_is_read(
    verb: str,
    arguments: tuple[object, ...],
    message: str,
    quantized: Path,
    cli: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(importlib.import_module("bitstrata.plans.load"), "open_checkpoint", read)
    prompt = ["x"] if verb == "generate" else []
    cli(verb, quantized, *prompt, *arguments).refused(2, message)
