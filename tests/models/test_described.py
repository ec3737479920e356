"""config.json, generation_config.json and the tokenizer are checked before they are used; arguments of `load` too."""

from __future__ import annotations

import json
import os
import shutil

import numpy
import pytest
import torch
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import bitstrata
from bitstrata.errors import CheckpointError, InputError, ModelError, UsageError
from bitstrata.models import load_tokenizer
from bitstrata.progress import notes, own_notes

IDS = torch.tensor([[5, 9, 33, 2, 17]])
GENERATION = "generation_config.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("described")
    tiny_llama(folder / "source")
    bitstrata.quantize(folder / "source", folder / "out", bits="2-3", method="rtn", group_size=32)
    return folder / "out"


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "out")


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_a_change_of_the_config_that_moves_the_output_is_said(folder, caplog):
    before = logits(bitstrata.load(folder))
    edit(folder / "config.json", rms_norm_eps=0.5)
    with own_notes():
        model = bitstrata.load(folder)
        said = notes()
    assert not torch.equal(logits(model), before)
    assert "(changed: rms_norm_eps), and is used as it is now" in said[0]
    caplog.clear()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))
    assert "(changed: rms_norm_eps)" in caplog.text
    with pytest.raises(CheckpointError, match="rms_norm_eps"):
        bitstrata.load(folder, verify=True)


def test_an_unchanged_config_is_not_spoken_of(folder):
    with own_notes():
        bitstrata.load(folder)
        assert notes() == ()


@pytest.mark.parametrize("load", [bitstrata.load, AutoModelForCausalLM.from_pretrained], ids=["load", "transformers"])
def test_another_quantization_config_is_refused(folder, load):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["method"] = "other"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="changed: quantization_config"):
        load(folder)


@pytest.mark.parametrize("count", [1001, 2**31 - 1, 10**30])
def test_blocks_without_weights_are_counted_before_they_are_made(folder, count, monkeypatch):
    edit(folder / "config.json", num_hidden_layers=count, text_config={"n_layer": 3})
    monkeypatch.setattr("bitstrata.models.config.AutoConfig.from_pretrained", None)  # would make a list of them
    with pytest.raises(CheckpointError, match=rf"{count} blocks \(num_hidden_layers\), the files have weights for 2"):
        bitstrata.load(folder)


def test_a_tensor_of_another_shape_is_named_with_both(folder):
    edit(folder / "config.json", vocab_size=65)
    with pytest.raises(
        CheckpointError, match=r"(lm_head|embed_tokens)\.weight is \[64, 64\] in .*, \[65, 64\] in the model"
    ):
        bitstrata.load(folder)


BAD_GENERATION = {
    "not json": ("{", "is not valid JSON"),
    "a list": ("[]", "must hold a JSON object, found a list"),
    "deep": ("[" * 5000 + "]" * 5000, "is not valid JSON"),
    "eos a string": ('{"eos_token_id": "x"}', "eos_token_id: "),
    "eos beyond a machine's integers": (f'{{"eos_token_id": {10**30}}}', "eos_token_id: "),
    "temperature a list": ('{"temperature": [1]}', "temperature: "),
    "top_k a fraction": ('{"top_k": 1.5}', "top_k: "),
    "no beams": ('{"num_beams": 0}', "num_beams: "),
    "a cache of no kind": ('{"cache_implementation": "none such"}', "cache_implementation"),
    "a barred token too high": (
        '{"bad_words_ids": [[1], [64]]}',
        "bars token 64, .*; the model has 64 tokens",
    ),
}


@pytest.mark.parametrize("case", BAD_GENERATION)
def test_a_generation_config_that_cannot_be_used_is_named(folder, case):
    text, said = BAD_GENERATION[case]
    (folder / GENERATION).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{GENERATION}.*{said}") as caught:
        bitstrata.load(folder)
    assert "Traceback" not in caught.value.message


def test_a_generation_config_that_can_be_used_is(folder):
    edit(folder / GENERATION, repetition_penalty=2, top_k=7, eos_token_id=[1, 2], num_beams=2, max_time=1e9)
    model = bitstrata.load(folder)
    values = model.generation_config
    assert (values.repetition_penalty, values.top_k, values.eos_token_id) == (2.0, 7, [1, 2])
    assert isinstance(values.repetition_penalty, float)  # transformers refuses the integer when it generates
    assert bitstrata.generate(model, "ab", max_new_tokens=3).tokens >= 1
    (folder / GENERATION).unlink()
    assert bitstrata.load(folder).generation_config.top_k != 7


def test_a_generation_config_or_tokenizer_that_is_a_pipe_is_not_waited_for(folder):
    for file in (GENERATION, "tokenizer_config.json"):
        (folder / file).unlink()
        os.mkfifo(folder / file)
        with pytest.raises(InputError, match=f"{file} is not a file but a pipe"):
            bitstrata.generate(folder, "ab", max_new_tokens=1)
        (folder / file).unlink()


@pytest.mark.parametrize(
    ("values", "said"),
    [({"model_max_length": [9]}, "has no usable tokenizer"), ({"chat_template": 7}, "chat_template is a int")],
    ids=str,
)
def test_a_tokenizer_that_would_fail_when_it_is_used_is_refused(folder, values, said):
    edit(folder / "tokenizer_config.json", **values)
    with pytest.raises(InputError, match=said):
        load_tokenizer(folder)


def test_numbers_of_any_whole_type_are_taken(good):
    expected = logits(bitstrata.load(good, bits=2))
    for arguments in ({"bits": numpy.int64(2)}, {"max_bits": numpy.uint8(2)}, {"plan": numpy.int32(2)}):
        assert torch.equal(logits(bitstrata.load(good, **arguments)), expected)


@pytest.mark.parametrize(
    "arguments",
    [{"bits": "3"}, {"bits": 2.0}, {"bits": True}, {"max_bits": "4"}, {"max_bits": 2.5}, {"max_bits": True},
     {"plan": 2.0}, {"plan": True}, {"budget": 600}, {"fit": True, "context": "9"}, {"dtype": "no such"},
     {"dtype": torch.int8}, {"device": None}, {"device": 7.5}],
    ids=str,
)  # fmt: skip
def test_arguments_of_another_type_are_refused(good, arguments):
    with pytest.raises(UsageError):
        bitstrata.load(good, **arguments)


def test_a_dtype_may_be_named(good):
    for arguments in ({}, {"plan": 2}):
        assert bitstrata.load(good, dtype="bfloat16", **arguments).dtype == torch.bfloat16


def test_what_is_no_folder_is_refused(good, tmp_path):
    model = bitstrata.load(good)
    assert isinstance(model, LlamaForCausalLM)
    for what in (model, None, 7, [good], str(good).encode()):
        with pytest.raises(UsageError, match=f"a {type(what).__name__} is not the folder or hub id of a bitstrata"):
            bitstrata.load(what)
        with pytest.raises(UsageError, match="is not the folder or hub id"):
            bitstrata.inspect(what)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ModelError, match=r"link is a link to nowhere, which is not there"):
        bitstrata.load(tmp_path / "link")
    with pytest.raises(ModelError, match="there is no bitstrata checkpoint folder"):
        bitstrata.load("./" + 300 * "x")
    name = os.fsdecode(os.fsencode(tmp_path / "out") + b"\xff")
    shutil.copytree(good, name)
    with pytest.raises(ModelError, match="is not UTF-8"):
        bitstrata.load(name)
