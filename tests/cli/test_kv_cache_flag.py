"""`--kv-cache-dtype`: the verbs that run a model take it, and say what there is where they cannot."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from cli_outcome import Command

from bitstrata.runtime.batching import memory


def test_generate_keeps_its_cache_in_codes(quantized: Path, cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    made, plain = [], memory.TokenPool.__init__

    def noted(self: memory.TokenPool, tokens: int, kv_cache_dtype: str = "auto") -> None:
        made.append(kv_cache_dtype)
        plain(self, tokens, kv_cache_dtype)

    monkeypatch.setattr(memory.TokenPool, "__init__", noted)
    for kind in ("int8", "int4"):
        arguments = ("--max-new-tokens", 4, "--kv-cache-dtype", kind, "--json")
        done = cli("generate", quantized, "the ", *arguments)
        assert done.code == 0, done.err
        assert json.loads(done.out)["tokens"] > 0
        assert kind in made


def test_the_whole_model_of_bench(quantized: Path, cli: Command) -> None:
    quick = ("--rounds", 1, "--device", "cpu", "--rows", 1, "--regime", "cache", "--bits", 2, "--json")
    done = cli("bench", quantized, "--kv-cache-dtype", "int8", *quick)
    assert done.code == 0, done.err
    assert json.loads(done.out)["models"]
    cli("bench", "--shapes", "96x160", "--kv-cache-dtype", "int8", *quick).refused(2, "whole models on a CPU")


@pytest.mark.parametrize("verb", ["generate", "chat", "serve", "bench"])
def test_others_are_refused_before_a_model_is_read(
    verb: str, quantized: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(importlib.import_module("bitstrata.plans.load"), "open_checkpoint", read)
    prompt = ["x"] if verb == "generate" else []
    cli(verb, quantized, *prompt, "--kv-cache-dtype", "fp8").refused(2, "kv_cache_dtype='fp8'", "auto, int8, int4")
