"""What Python callers may give: any whole number; what is of another type is named, all of it at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from job_helpers import RTN, digests, run
from transformers import AutoModelForCausalLM

import bitstrata
from bitstrata.checkpoint import CheckpointReader
from bitstrata.errors import PreflightError, TextError, UsageError


def problems(model: Any, output: Any, **settings: Any) -> list[str]:
    with pytest.raises(PreflightError) as caught:
        bitstrata.quantize(model, output, **{"method": "rtn", "device": "cpu", **settings})
    assert caught.value.exit_code == 2
    assert all(isinstance(problem, UsageError) for problem in caught.value.problems)
    assert all(len(problem.message) < 250 for problem in caught.value.problems)
    return [problem.message for problem in caught.value.problems]


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, torch.tensor], ids=lambda kind: kind.__name__)
def test_whole_numbers_of_other_libraries_are_whole_numbers(kind: Any, model: Path, text: Path, tmp_path: Path) -> None:
    plain = {"bits": [2, 4], "group_size": 32, "num_samples": 5, "seq_len": 32, "seed": 3, "head_bits": 6}
    run(model, tmp_path / "plain", text, method="bcq", options={"rounds": 2}, **plain)
    other: dict[str, Any] = {name: kind(value) for name, value in plain.items() if name != "bits"}
    other["bits"] = [2, 4] if kind is torch.tensor else [kind(value) for value in (2, 4)]
    run(model, tmp_path / "other", text, method="bcq", options={"rounds": kind(2)}, **other)
    assert digests(tmp_path / "other") == digests(tmp_path / "plain")


def test_numbers_of_numpy_are_numbers_in_options_too(model: Path, text: Path, tmp_path: Path) -> None:
    options = {"steps": 2, "rounds": 2, "batch_size": 4, "learning_rate": 0.5}
    run(model, tmp_path / "plain", text, method="anybcq", options=options)
    run(model, tmp_path / "other", text, method="anybcq", options={k: np.asarray(v)[()] for k, v in options.items()})
    assert digests(tmp_path / "other") == digests(tmp_path / "plain")


def test_everything_of_the_wrong_type_is_named_at_once(model: Path, tmp_path: Path) -> None:
    found = problems(
        model,
        tmp_path / "out",
        bits=[2.5],
        group_size="64",
        num_samples=None,
        seq_len=None,
        seed=1.0,
        head_bits=True,
        calibration=7.5,
        skip=7,
        preset=None,
        device="cpu",
    )
    for part, message in zip(
        (
            "bits [2.5] cannot be used",
            "unknown preset None",
            "--group-size must be a whole number, got '64'",
            "--num-samples must be a whole number, got None",
            "--seq-len must be a whole number, got None",
            "--seed must be a whole number, got 1.0",
            "--head-bits must be a whole number from 1 to 8, got True",
            "--calibration must be a path, got 7.5",
            "--skip must be patterns of names, got 7",
        ),
        found,
        strict=True,
    ):
        assert part in message
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_is_named_before_a_model_in_memory_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    monkeypatch.setattr(type(loaded), "save_pretrained", lambda *_: pytest.fail("the model was written"))
    found = problems(loaded, None, group_size=None)
    assert found == ["the output must be a path, got None", "--group-size must be a whole number, got None"]
    (message,) = problems(torch.nn.Linear(2, 2), tmp_path / "out")
    assert message.startswith("the model must be a path, got Linear(")


@pytest.mark.parametrize("settings", [{"method": None}, {"method": ["rtn"]}, {"options": 5}, {"options": ["a=1"]}])
def test_methods_and_options_of_the_wrong_type(settings: dict[str, Any], model: Path, tmp_path: Path) -> None:
    (message,) = problems(model, tmp_path / "out", **settings)
    assert next(iter(settings)).rstrip("s") in message


def test_one_pattern_is_one_pattern(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "one", None, **RTN, skip="*.down_proj")
    run(model, tmp_path / "several", None, **RTN, skip=["*.down_proj"])
    assert digests(tmp_path / "one") == digests(tmp_path / "several")
    layers = CheckpointReader(tmp_path / "one").spec.layers
    assert len(layers) == 3 * 6
    assert not any(name.endswith("down_proj") for name in layers)


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quantized") / "out"
    run(model, output, None, **RTN)
    return output


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": 7.5}, "the text must be a path, got 7.5"),
        ({"text": None}, "nothing to measure"),
        ({"text": b"text.txt"}, "the text must be a path"),
        ({"seq_len": "32"}, "seq_len must be a whole number, got '32'"),
        ({"seq_len": 16.0}, "seq_len must be a whole number, got 16.0"),
        ({"max_tokens": "all"}, "max_tokens must be a whole number"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_evaluate_names_what_is_of_the_wrong_type(
    changes: dict[str, Any], said: str, quantized: Path, text: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        bitstrata.evaluate(**{"model": quantized, "text": text, "device": "cpu", **changes})


def test_evaluate_takes_whole_numbers_of_other_libraries(quantized: Path, text: Path) -> None:
    plain = bitstrata.evaluate(quantized, text, seq_len=16, max_tokens=50, device="cpu")
    other = bitstrata.evaluate(quantized, text, seq_len=np.int64(16), max_tokens=np.int32(50), device="cpu")
    assert other.to_json() == plain.to_json()


RECORDS = [{"text": f"some words, number {index}", "id": index} for index in range(300)]


LISTS = (
    json.dumps(RECORDS),
    json.dumps([record["text"] for record in RECORDS], indent=1),
    "\ufeff" + "\r\n".join(json.dumps([record["text"]]) for record in RECORDS),
)
OBJECTS = (
    "\n".join(map(json.dumps, RECORDS)),
    "\n\n".join(map(json.dumps, RECORDS)) + "\n",
    json.dumps({"data": RECORDS}, indent=2),
    "\n".join(json.dumps({"text": "word " * 900}) for _ in range(300)),  # beyond what is looked at line by line
)


@pytest.mark.parametrize(
    ("name", "content"),
    # what is called .jsonl and holds an object a line is documents or chats
    [*(("text.txt", content) for content in (*LISTS, *OBJECTS)), *(("text.jsonl", content) for content in LISTS)],
    ids=[*(f"text-{number}" for number in range(7)), *(f"jsonl-{number}" for number in range(3))],
)
def test_json_is_not_taken_for_text(name: str, content: str, model: Path, quantized: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(PreflightError, match="holds JSON, not text") as caught:
        run(model, tmp_path / "out", path)
    (problem,) = caught.value.problems
    assert isinstance(problem, TextError)
    assert "<|endoftext|>" in (problem.hint or "")
    assert not (tmp_path / "out").exists()
    with pytest.raises(TextError, match="holds JSON, not text"):
        bitstrata.evaluate(quantized, path, device="cpu")


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(map(json.dumps, RECORDS)) + "<|endoftext|>",  # whoever means JSON says so
        "[1] a footnote\n[2] another\n" * 40,
        '{"text": "one line of it"}\nand then words, many of them. ' * 30,
        "{ int main() { return 0; } }\n" * 40,
        "7\n8\n9\n" * 200,
        '"quoted" he said\n' * 60,
    ],
)
def test_text_that_only_looks_like_json_is_text(content: str, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(content)
    assert run(model, tmp_path / "out", path, **RTN).heldout_tokens > 0


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "missing.txt", "folder"])
def test_a_text_that_cannot_be_opened_is_named_in_short(name: str, quantized: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(TextError) as caught:
        bitstrata.evaluate(quantized, tmp_path / name, device="cpu")
    assert len(caught.value.message) < 400
