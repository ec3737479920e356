"""What a Python caller may give to `quantize` instead of files: a model, texts, chats."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitstrata
from bitstrata.calibration import Mix, read_mix, text_digest, text_name
from bitstrata.checkpoint import CheckpointReader
from bitstrata.demonstration.run import MODEL
from bitstrata.errors import PreflightError, ResourceError, TextError, UsageError

TEXTS = [f"def function_{number}(value):\n    return value * {number} + value\n" * 4 for number in range(40)]
SMALL = {"bits": "2,3", "num_samples": 2, "seq_len": 32}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: load_file(file)[name] for file in folder.glob("*.safetensors") for name in load_file(file)}


def test_texts_are_as_a_file_of_them(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("<|endoftext|>".join(TEXTS))
    bitstrata.quantize(MODEL, tmp_path / "file", calibration=file, **SMALL)
    bitstrata.quantize(MODEL, tmp_path / "list", calibration=TEXTS, **SMALL)
    found, expected = weights(tmp_path / "list"), weights(tmp_path / "file")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert CheckpointReader(tmp_path / "list").spec.provenance["calibration"] == "40 texts"


def test_chats_are_as_a_file_of_them(tmp_path):
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}] for text in TEXTS[:3]]
    listed, named = read_mix(chats), read_mix([{"messages": chat} for chat in chats])
    assert isinstance(listed, Mix)
    assert text_digest(listed) == text_digest(named)
    assert text_name(chats) == "3 chats"
    assert [chat.messages[0]["content"] for chat in listed.sources[0].chats] == TEXTS[:3]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "list of texts is empty"),
        ([" ", "\n"], "list of texts is empty"),
        (["a", [{"role": "user", "content": "a"}]], "texts and chats"),
        ([{"messages": "a"}], "the list's entry 1 has no list of messages"),
        ([[{"role": "user"}]], "the list's entry 1 has a message without content"),
        ([[{"role": "user", "content": "a"}], 7], "entry 2 of the list is a int"),
    ],
    ids=range(6),
)
def test_lists_that_hold_nothing_to_learn_from(given, said, tmp_path):
    with pytest.raises(TextError, match=said):
        read_mix(given)
    with pytest.raises(PreflightError) as caught:
        bitstrata.quantize(MODEL, tmp_path / "out", calibration=given, **SMALL)
    assert any(said in str(problem) for problem in caught.value.problems)
    assert not (tmp_path / "out").exists()


def test_a_model_that_was_changed_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    model.save_pretrained(tmp_path / "changed")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "changed")
    bitstrata.quantize(model, tmp_path / "out", calibration=TEXTS, **SMALL)
    bitstrata.quantize(tmp_path / "changed", tmp_path / "expected", calibration=TEXTS, **SMALL)
    found, expected = weights(tmp_path / "out"), weights(tmp_path / "expected")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert CheckpointReader(tmp_path / "out").spec.provenance["model"] == Path(MODEL).name
    assert not list(tmp_path.glob("bitstrata-*")), "what was written meanwhile is gone"

    with pytest.raises(UsageError, match="quantized already"):
        bitstrata.quantize(bitstrata.load(tmp_path / "out"), tmp_path / "again")


def test_no_room_for_the_model(tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    monkeypatch.setattr(type(model), "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(ResourceError, match=r"cannot be written.*No space left"):
        bitstrata.quantize(model, tmp_path / "out", bits=3, method="rtn")
    assert not (tmp_path / "out").exists()
