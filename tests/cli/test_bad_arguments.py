"""Wrong flags, texts and output folders: named, explained, and nothing touched."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_outcome import Command
from job_helpers import digests
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama

QUICK = ("--method", "bcq", "--option", "rounds=2", "--group-size", "32")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bits", "0"], "bits '0' cannot be used"),
        (["--bits", "9"], "bits '9' cannot be used"),
        (["--bits", "abc"], "bits 'abc' cannot be used"),
        (["--bits", "4-2"], "bits '4-2' cannot be used"),
        (["--bits", "2,,3"], "bits '2,,3' cannot be used"),
        (["--bits", ""], "bits '' cannot be used"),
        (["--group-size", "0"], "--group-size must be at least 1, got 0"),
        (["--group-size", "-1"], "--group-size must be at least 1, got -1"),
        (["--num-samples", "0"], "--num-samples must be at least 1"),
        (["--seq-len", "1"], "--seq-len must be at least 2"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--head-bits", "0"], "--head-bits must be a whole number from 1 to 8, got 0"),
        (["--head-bits", "9"], "--head-bits must be a whole number from 1 to 8, got 9"),
        (["--method", "magic"], "unknown method 'magic'"),
        (["--preset", "slow"], "unknown preset 'slow'"),
        (["--option", "rounds"], "'rounds' must look like NAME=VALUE"),
        (["--option", "speed=9"], "no option 'speed'"),
        (["--option", "rounds=fast"], "rounds of bcq must be int"),
        (["--device", "abacus"], "'abacus' is not a device"),
        (["--skip", "no.such.layer"], "no linear layer matches --skip no.such.layer"),
        (["--skip", "re:("], "re:( is not a regular expression"),
        (["--method", "anybcq"], "anybcq needs calibration text"),
    ],
)
def test_a_wrong_argument_is_a_usage_error(
    arguments: list[str], said: str, model: Path, tmp_path: Path, cli: Command
) -> None:
    cli("quantize", model, "-o", tmp_path / "out", *QUICK, *arguments).refused(2, said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantize", "MODEL", "-o", "OUT", "--colour", "blue"], "No such option: --colour"),
        (["quantize", "MODEL", "-o", "OUT", "--group-size", "many"], "--group-size"),
        (["quantize", "MODEL", "-o", "OUT", "--head-bits", "4-6"], "--head-bits"),
        (["quantize", "MODEL"], "Missing option '-o'"),
        (["quantize"], "Missing argument"),
        (["eval"], "Missing argument 'model'"),
        (["generate", "MODEL", "words", "--max-new-tokens", "x"], "--max-new-tokens"),
        (["dance"], "No such command 'dance'"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_a_usage_error(arguments: list[str], said: str, cli: Command) -> None:
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert said in outcome.err
    assert "Usage: bitstrata" in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


def test_without_a_verb_the_help_is_shown(cli: Command) -> None:
    assert cli().code == 2
    outcome = cli("--help")
    assert outcome.code == 0
    for verb in ("demo", "quantize", "eval", "generate", "inspect", "env"):
        assert verb in outcome.out
    assert cli("quantize", "-h").code == 0
    assert cli("--version").out.startswith("bitstrata ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n ", "is empty"),
        ("caf\u00e9".encode("latin1"), "is not UTF-8: byte 3 is 0xe9"),
        (b"too short", "the calibration text has 10 tokens; two windows of 32 are the least"),
        (None, "there is no text"),
    ],
    ids=["empty", "blank", "not UTF-8", "short", "missing"],
)
def test_an_unusable_text_is_bad_input(
    content: bytes | None, said: str, model: Path, quantized: Path, tmp_path: Path, cli: Command
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    arguments = ["--calibration", text, "--seq-len", "32"]
    cli("quantize", model, "-o", tmp_path / "out", *QUICK, *arguments).refused(3, said)
    assert not (tmp_path / "out").exists()
    if content != b"too short":
        cli("eval", quantized, "--text", text).refused(3, said)


def test_every_problem_is_listed_at_once(tmp_path: Path, cli: Command) -> None:
    """Wrong in the files: a NaN, a shape, a text, a pattern, an output; and in the flags."""
    source = tiny_llama(tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    weights["model.norm.weight"] = weights["model.norm.weight"][:5].clone()
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    (tmp_path / "out").write_text("a file")
    arguments = ["--calibration", tmp_path / "none.txt", "--skip", "nothing.*"]
    outcome = cli("quantize", source, "-o", tmp_path / "out", *QUICK, *arguments)
    outcome.refused(3, "5 problems found before starting; nothing was written", "up_proj.weight holds NaN")
    outcome.refused(3, "model.norm.weight", "none.txt", "nothing.*", "out is a file", "  5. ")
    outcome = cli("quantize", source, "-o", tmp_path / "out", "--bits", "9", "--group-size", "0", "--method", "x")
    outcome.refused(3, "6 problems found", "'9'", "--group-size", "'x'", "out is a file", "NaN", "model.norm.weight")
    assert (tmp_path / "out").read_text() == "a file"


def test_a_folder_that_is_not_ours_is_left_alone(model: Path, tmp_path: Path, cli: Command) -> None:
    theirs = tmp_path / "thesis"
    (theirs / "chapters").mkdir(parents=True)
    (theirs / "chapters" / "one.tex").write_text("precious")
    (theirs / "config.json").write_text('{"model_type": "llama"}')
    before = digests(theirs)
    cli("quantize", model, "-o", theirs, *QUICK).refused(2, "was not made by bitstrata; it is left alone")
    assert digests(theirs) == before


def test_the_source_itself_is_no_output(model: Path, cli: Command) -> None:
    before = digests(model)
    cli("quantize", model, "-o", model, *QUICK).refused(2, "was not made by bitstrata")
    assert digests(model) == before


def test_a_file_is_no_output_folder(model: Path, tmp_path: Path, cli: Command) -> None:
    (tmp_path / "file").write_text("precious")
    cli("quantize", model, "-o", tmp_path / "file", *QUICK).refused(2, "is a file")
    cli("quantize", model, "-o", tmp_path / "file" / "below", *QUICK).refused(2, "is not a folder")
    assert (tmp_path / "file").read_text() == "precious"


def test_an_empty_folder_is_a_fine_output(model: Path, tmp_path: Path, cli: Command) -> None:
    (tmp_path / "out").mkdir()
    assert cli("quantize", model, "-o", tmp_path / "out", *QUICK).code == 0


def test_a_dry_run_leaves_nothing_and_fails_like_the_real_one(model: Path, tmp_path: Path, cli: Command) -> None:
    assert cli("quantize", model, "-o", tmp_path / "deep" / "out", *QUICK, "--dry-run").code == 0
    cli("quantize", model, "-o", tmp_path / "out", *QUICK, "--dry-run", "--bits", "0").refused(2, "bits '0'")
    assert list(tmp_path.iterdir()) == []


def test_other_settings_on_a_finished_output_are_refused_by_name(
    model: Path, text: Path, tmp_path: Path, cli: Command
) -> None:
    command = ["quantize", model, "-o", tmp_path / "out", *QUICK]
    assert cli(*command).code == 0
    before = digests(tmp_path / "out")
    again = cli(*command)
    assert again.code == 0
    assert "nothing to do" in again.err
    cli(*command, "--bits", "2").refused(2, "bits was [2, 3, 4], is now [2]", "choose another folder")
    cli(*command, "--option", "rounds=3").refused(2, "rounds was 2, is now 3")
    cli(*command, "--calibration", text, "--seq-len", 32).refused(2, "text_sha256 was None")
    assert digests(tmp_path / "out") == before
