"""eval, generate and inspect on a checkpoint with something wrong: which file, which tensor, what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_outcome import Command
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], object]


def spec(**values: Any) -> Damage:
    """Change `quantization_config`."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"].update(values)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def flip(name: str) -> Damage:
    """Flip one bit of the last byte of a file: of the data, not the header."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)

    return damage


def cut(name: str) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-7])


def without(name: str, tensor: str) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / name)
        del tensors[tensor]
        save_file(tensors, folder / name)

    return damage


PLANE = "model-plane-2.safetensors"
DAMAGES: dict[str, tuple[Damage, list[str]]] = {
    "a version from the future": (spec(format_version=99), ["format_version 99", "upgrade bitstrata"]),
    "an unknown field": (spec(colour="blue"), ["quantization_config.colour"]),
    "no bits": (spec(bits=[]), ["bits must be"]),
    "a plane file is missing": (lambda folder: (folder / PLANE).unlink(), [f"{PLANE} is missing"]),
    "a scale file is missing": (
        lambda folder: (folder / "model-bits-3.safetensors").unlink(),
        ["model-bits-3.safetensors is missing"],
    ),
    "a plane file is truncated": (cut(PLANE), [f"{PLANE} is not a whole safetensors file"]),
    "a tensor is missing": (
        without(PLANE, "model.layers.1.mlp.up_proj.plane_2"),
        ["tensor model.layers.1.mlp.up_proj.plane_2 is missing", PLANE],
    ),
    "the config is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        ["config.json is not valid JSON"],
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json is missing"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_malformed_checkpoint_is_refused_by_every_verb(
    name: str, quantized: Path, text: Path, tmp_path: Path, cli: Command
) -> None:
    damage, said = DAMAGES[name]
    folder = Path(shutil.copytree(quantized, tmp_path / "out"))
    damage(folder)
    for arguments in (["eval", folder, "--text", text], ["generate", folder, "words"], ["inspect", folder]):
        outcome = cli(*arguments)
        assert outcome.code == 3, f"{arguments[0]}: {outcome.err}"
        assert "this is a bug" not in outcome.err
        assert "Traceback" not in outcome.err
        assert outcome.out == ""
        for part in said:
            assert part in outcome.err, f"{arguments[0]}: {part!r} is not in {outcome.err!r}"


@pytest.mark.parametrize("name", ["model-common", "model-plane-0", "model-bits-4"])
def test_verification_notices_a_flipped_bit(name: str, quantized: Path, tmp_path: Path, cli: Command) -> None:
    folder = Path(shutil.copytree(quantized, tmp_path / "out"))
    flip(f"{name}.safetensors")(folder)
    cli("inspect", folder, "--verify").refused(3, f"{name}.safetensors is damaged")


def test_lower_bits_run_without_the_files_of_higher_ones(quantized: Path, tmp_path: Path, cli: Command) -> None:
    folder = Path(shutil.copytree(quantized, tmp_path / "out"))
    for name in ("model-plane-2", "model-plane-3", "model-bits-3", "model-bits-4"):
        (folder / f"{name}.safetensors").unlink()
    outcome = cli("generate", folder, "words", "--bits", "2", "--max-new-tokens", "3", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["bits"] == 2
    cli("generate", folder, "words", "--bits", "3").refused(3, "is missing")


@pytest.mark.parametrize("bits", ["0", "1", "5", "9"])
def test_bits_outside_the_file_are_a_usage_error(bits: str, quantized: Path, text: Path, cli: Command) -> None:
    evaluated = cli("eval", quantized, "--text", text, "--bits", bits)
    evaluated.refused(2, "bits")
    cli("generate", quantized, "words", "--bits", bits).refused(2, "supported bits: 2, 3, 4")
    cli("generate", f"{quantized}:{bits}", "words").refused(2, "supported bits: 2, 3, 4")
    if bits in "15":
        assert "supported bits: 2, 3, 4" in evaluated.err


def test_bits_in_the_name_and_in_the_flag(quantized: Path, tmp_path: Path, cli: Command) -> None:
    few = ["words", "--max-new-tokens", "3", "--json"]
    for bits in (2, 3):
        named, asked = cli("generate", f"{quantized}:{bits}", *few), cli("generate", quantized, *few, "--bits", bits)
        both = cli("generate", f"{quantized}:{bits}", *few, "--bits", bits)
        texts = [json.loads(outcome.out) for outcome in (named, asked, both)]
        assert [text["bits"] for text in texts] == [bits] * 3
        assert texts[0]["text"] == texts[1]["text"] == texts[2]["text"]
    assert json.loads(cli("generate", quantized, *few).out)["bits"] == 4
    cli("generate", f"{quantized}:3", "words", "--bits", "2").refused(2, "bits given twice: 3 in", "2 in --bits")
    cli("generate", f"{quantized}:two", "words").refused(3, "there is no bitstrata checkpoint folder")
    colon = Path(shutil.copytree(quantized, tmp_path / "out:3"))
    assert json.loads(cli("generate", colon, *few).out)["bits"] == 4, "a folder of that very name comes first"


def test_what_is_no_checkpoint_is_refused(model: Path, text: Path, tmp_path: Path, cli: Command) -> None:
    (tmp_path / "empty").mkdir()
    cases = [
        (model, "is not a bitstrata checkpoint"),
        (tmp_path / "empty", "config.json is missing"),
        (tmp_path / "nowhere", "there is no bitstrata checkpoint folder"),
        (text, "is a file, not a bitstrata checkpoint folder"),
    ]
    for folder, said in cases:
        cli("eval", folder, "--text", text).refused(3, said)
        cli("generate", folder, "words").refused(3, said)
        cli("inspect", folder).refused(3, said)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--temperature", "-1"], 2, "temperature must not be negative"),
        (["--top-p", "0"], 2, "top_p must lie in"),
        (["--max-new-tokens", "0"], 2, "max_new_tokens"),
        (["--device", "abacus"], 2, "'abacus' is not a device"),
    ],
)
def test_wrong_arguments_of_generate(arguments: list[str], code: int, said: str, quantized: Path, cli: Command) -> None:
    outcome = cli("generate", quantized, "words", *arguments)
    assert outcome.code == code
    assert said in outcome.err
    assert outcome.out == ""


def test_a_prompt_that_fills_the_context_is_refused(quantized: Path, cli: Command) -> None:
    cli("generate", quantized, "x" * 64).refused(3, "the prompt has 65 tokens, the model's context is 64")
    outcome = cli("generate", quantized, "x" * 60, "--json")
    assert outcome.code == 0
    assert "max-new-tokens lowered from 64 to 3" in outcome.err
    assert json.loads(outcome.out)["tokens"] <= 3


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--seq-len", "1"], 2, "seq_len must be at least 2"),
        (["--max-tokens", "0"], 2, "max_tokens must be at least 1"),
        (["--bits", "2,x"], 2, "bits '2,x' cannot be used"),
        (["--reference", "./nowhere"], 3, "there is no reference model folder"),
    ],
)
def test_wrong_arguments_of_eval(
    arguments: list[str], code: int, said: str, quantized: Path, text: Path, cli: Command
) -> None:
    outcome = cli("eval", quantized, "--text", text, *arguments)
    assert outcome.code == code
    assert said in outcome.err
    assert outcome.out == ""
