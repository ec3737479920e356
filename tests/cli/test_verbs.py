"""What the verbs print and where: JSON alone on stdout, everything else on stderr, tracebacks only on request."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_outcome import Command
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama

import bitstrata
from bitstrata.cli.output import show
from bitstrata.errors import CheckError

QUICK = ["--method", "bcq", "--option", "rounds=2", "--group-size", "32", "--bits", "2-3"]
MEASURED = ["--seq-len", "32", "--num-samples", "4"]


def test_json_is_the_whole_of_stdout(model: Path, text: Path, quantized: Path, tmp_path: Path, cli: Command) -> None:
    commands = {
        "quantize": ["quantize", model, "-o", tmp_path / "out", *QUICK, *MEASURED, "--calibration", text],
        "dry run": ["quantize", model, "-o", tmp_path / "dry", *QUICK, "--dry-run"],
        "nothing to do": ["quantize", model, "-o", tmp_path / "out", *QUICK, *MEASURED, "--calibration", text],
        "eval": ["eval", quantized, "--text", text, "--reference", model, "--max-tokens", "40", "--seq-len", "999"],
        "generate": ["generate", quantized, "words", "--max-new-tokens", "4"],
        "inspect": ["inspect", quantized, "--verify"],
        "env": ["env"],
    }
    wanted = {
        "quantize": {"method", "group_size", "results", "reference", "layer_error", "left_out", "notes", "seconds"},
        "eval": {"model", "text", "tokens", "reference", "results"},
        "generate": {"prompt", "text", "bits", "tokens", "seconds", "tokens_per_second"},
        "inspect": {"method", "group_size", "bits", "bpw_read", "bytes", "total_bytes", "layers"},
        "env": {"bitstrata", "python", "packages", "gpus", "kernels"},
    }
    for name, command in commands.items():
        outcome = cli(*command, "--json")
        assert outcome.code == 0, f"{name}: {outcome.err}"
        found = json.loads(outcome.out)  # fails on anything beside one object
        assert isinstance(found, dict)
        assert wanted.get(name, set()) <= found.keys(), name
        plain = cli(*command)
        assert plain.code == 0
        assert plain.out.strip()
        assert not plain.out.startswith("{")


def test_numbers_that_json_lacks_become_null(capsys: pytest.CaptureFixture[str]) -> None:
    class Odd:
        def to_json(self) -> dict[str, object]:
            return {"perplexity": math.inf, "rows": [{"kld": math.nan, 2: 1.5}], "bits": (2, 3)}

    show(Odd(), as_json=True)
    assert json.loads(capsys.readouterr().out) == {
        "perplexity": None, "rows": [{"kld": None, "2": 1.5}], "bits": [2, 3],
    }  # fmt: skip


def test_the_json_of_inspect_and_eval_agree(quantized: Path, text: Path, cli: Command) -> None:
    inspected = json.loads(cli("inspect", quantized, "--json").out)
    measured = json.loads(cli("eval", quantized, "--text", text, "--max-tokens", "20", "--json").out)
    assert inspected["bits"] == [2, 3, 4]
    for row in measured["results"]:
        assert inspected["bpw_read"][str(row["bits"])] == row["bpw_read"]
        assert inspected["bytes"][str(row["bits"])] == row["bytes"]
    assert len(inspected["layers"]) == 14
    assert measured["reference"] is None
    assert measured["tokens"] == 20


def test_progress_goes_to_stderr_a_line_a_block(model: Path, text: Path, tmp_path: Path, cli: Command) -> None:
    outcome = cli("quantize", model, "-o", tmp_path / "out", *QUICK, *MEASURED, "--calibration", text)
    assert "quantizing: block 1/2 model.layers.0" in outcome.err
    assert "quantizing: block 2/2 model.layers.1" in outcome.err
    assert "quantizing" not in outcome.out
    assert "rtn kld" in outcome.out
    assert str(tmp_path / "out") in outcome.out


def test_generate_streams_the_text_and_says_its_speed_elsewhere(quantized: Path, cli: Command) -> None:
    plain = cli("generate", quantized, "hello", "--max-new-tokens", "5", "--bits", "3")
    made = json.loads(cli("generate", quantized, "hello", "--max-new-tokens", "5", "--bits", "3", "--json").out)
    assert made["text"].strip() in plain.out
    assert "[3 bits, " in plain.err
    again = json.loads(cli("generate", f"{quantized}:3", "hello", "--max-new-tokens", "5", "--json").out)
    assert again["text"] == made["text"], "greedy text changes from run to run"


def test_sampling_depends_on_the_seed_only(quantized: Path, cli: Command) -> None:
    def sample(seed: int) -> str:
        warm = ["--temperature", "2", "--seed", seed, "--max-new-tokens", "20", "--json"]
        return str(json.loads(cli("generate", quantized, "hello", *warm).out)["text"])

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_zero_and_constant_layers_run(text: Path, tmp_path: Path, cli: Command) -> None:
    source = tiny_llama(tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.self_attn.o_proj.weight"].zero_()
    weights["model.layers.1.mlp.gate_proj.weight"].fill_(0.02)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    command = ["quantize", source, "-o", tmp_path / "out", *MEASURED, "--calibration", text, "--group-size", "32"]
    outcome = cli(*command, "--option", "tune_steps=2", "--json")
    assert outcome.code == 0, outcome.err
    for row in json.loads(outcome.out)["results"]:
        assert all(isinstance(row[name], float) for name in ("nll", "kld", "top1_agreement"))
    evaluated = json.loads(cli("eval", tmp_path / "out", "--text", text, "--max-tokens", "60", "--json").out)
    assert all(isinstance(row["nll"], float) for row in evaluated["results"])


def test_a_result_that_is_not_finite_fails_the_check(text: Path, tmp_path: Path, cli: Command) -> None:
    """Finite weights, but logits beyond fp32: no checkpoint is left, and the exit code says why."""
    source = tiny_llama(tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"].fill_(3e38)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    outcome = cli("quantize", source, "-o", tmp_path / "out", *QUICK, *MEASURED, "--calibration", text)
    outcome.refused(CheckError.exit_code, "the loss is not finite at")
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_error_shows_its_traceback_only_with_debug(tmp_path: Path, cli: Command) -> None:
    command = ["inspect", tmp_path / "nowhere"]
    assert "Traceback" not in cli(*command).err
    outcome = cli(*command, debug=True)
    assert outcome.code == 3
    assert "Traceback" in outcome.err
    assert "hint: " in outcome.err


def test_what_nobody_foresaw_is_called_a_bug(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("surprise")

    monkeypatch.setattr("bitstrata.runtime.env", broken)
    outcome = cli("env")
    assert outcome.code == 1
    assert "surprise" in outcome.err
    assert "this is a bug in bitstrata" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MemoryError(), 4, "out of memory"),
        (torch.OutOfMemoryError("no more"), 4, "out of memory"),
        (OSError(28, "No space left on device"), 4, "the disk is full"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_resources_and_interruption_have_their_codes(
    error: BaseException, code: int, said: str, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("bitstrata.runtime.env", fails)
    outcome = cli("env")
    assert outcome.code == code
    assert said in outcome.err
    assert "bug" not in outcome.err


def test_python_and_command_line_have_the_same_defaults(model: Path, tmp_path: Path, cli: Command) -> None:
    """One verb is one function: the same quantization, whichever way it is asked for."""
    assert cli("quantize", model, "-o", tmp_path / "cli", "--method", "bcq").code == 0
    bitstrata.quantize(model, tmp_path / "python", method="bcq")
    assert (tmp_path / "cli" / "config.json").read_text() == (tmp_path / "python" / "config.json").read_text()


def test_the_program_itself(quantized: Path) -> None:
    """Its exit codes when it fails are those of the processes in tests/quantization/test_kill.py."""
    command = [sys.executable, "-m", "bitstrata.cli.main", "inspect", str(quantized), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
    assert json.loads(done.stdout)["bits"] == [2, 3, 4]
