"""Digests of config.json: what changes them and what does not, and what a reader makes of a change."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
import torch
from damage import CONFIG, INDEX, edit_index, edit_json, edit_spec, replace_file
from helpers import random_weight, save_checkpoint
from safetensors.torch import save_file

import bitstrata
from bitstrata.checkpoint import CheckpointReader, validate
from bitstrata.checkpoint.config_digest import changed_fields, config_digests
from bitstrata.errors import CheckpointError
from bitstrata.progress import notes, own_notes


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path, {"a": random_weight(5, 70)}, common={"norm.weight": torch.ones(4)})
    return tmp_path


def forget_config_digests(folder):
    edit_index(lambda index: index["metadata"].pop("config_sha256"))(folder)


def test_a_digest_is_that_of_the_canonical_json_of_a_value():
    config = {"b": {"y": 10000.0, "x": [1e-05, "é", None, True]}, "a": 2}
    canonical = {"a": "2", "b": '{"x":[1e-05,"\\u00e9",null,true],"y":10000}'}
    assert config_digests(config) == {
        name: hashlib.sha256(text.encode()).hexdigest() for name, text in canonical.items()
    }


def test_how_the_file_is_written_does_not_matter():
    config = {"theta": 1e4, "eps": 0.00001, "big": 1e300, "s": {"b": "ö", "a": [1, -0.5]}}
    digests = config_digests(config)
    other = '{"s": {"a": [1.0, -5e-1], "b": "\\u00f6"},\n"big": 1E300, "eps": 1E-5, "theta": 10000}'
    assert changed_fields(json.loads(other), digests) == ()


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        (lambda c: c.update(theta=10001), ("theta",)),
        (lambda c: c.update(theta="10000"), ("theta",)),
        (lambda c: c.update(on=1), ("on",)),
        (lambda c: c.update(extra=None), ("extra",)),
        (lambda c: c.update(EPS=c.pop("eps")), ("EPS", "eps")),
        (lambda c: c["s"].update(a=[2, 1]), ("s",)),
    ],
    ids=["number", "type", "bool", "new", "renamed", "order-of-a-list"],
)
def test_what_a_model_would_notice_is_a_change(change, fields):
    config = {"theta": 10000.0, "eps": 1e-5, "on": True, "s": {"a": [1, 2]}}
    digests = config_digests(config)
    change(config)
    assert changed_fields(config, digests) == fields


def test_every_field_of_what_was_written_is_covered(folder):
    reader = CheckpointReader(folder, verify=True)
    assert reader.covers_config
    assert json.loads((folder / INDEX).read_text())["metadata"]["config_sha256"].keys() == reader.config.keys()


def test_a_changed_field_is_named_and_refused_when_verifying(folder):
    edit_json(CONFIG, lambda config: config.update(rope_theta=9.0))(folder)
    reader = CheckpointReader(folder)
    with own_notes():
        reader.note_changes()
        said = notes()
    assert reader.changed_config == ("rope_theta",)
    assert "config.json is not as it was written (changed: rope_theta)" in said[0]
    with pytest.raises(CheckpointError, match=r"config\.json is not as it was written \(changed: rope_theta\)"):
        CheckpointReader(folder, verify=True)
    (problem,) = validate(folder)
    assert "(changed: rope_theta)" in problem
    forget_config_digests(folder)
    assert validate(folder) == []


def test_a_group_size_with_as_many_groups_is_refused_although_every_shape_fits(folder):
    """K = 70 has three groups of 32 and three of 34; the weights would be others."""
    edit_spec(lambda spec: spec.update(group_size=34))(folder)
    with pytest.raises(CheckpointError, match=r"not as it was written \(changed: quantization_config\)"):
        CheckpointReader(folder)
    forget_config_digests(folder)
    assert CheckpointReader(folder).spec.group_size == 34


@pytest.mark.parametrize("digests", [[1], {"a": 1}, "x", 7], ids=str)
def test_digests_that_are_none_are_refused(folder, digests):
    edit_index(lambda index: index["metadata"].update(config_sha256=digests))(folder)
    with pytest.raises(CheckpointError, match=r"metadata\.config_sha256 must map fields of config\.json to digests"):
        CheckpointReader(folder)


def test_inspect_says_what_is_covered(folder):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "bitstrata_report.json").write_text("no JSON")  # readers do not need it
    found = bitstrata.inspect(folder, verify=True)
    assert (found.verified, found.unchecked) == (True, ("bitstrata_report.json", "tokenizer.json"))
    assert "every byte of the weights and every field of config.json checked: ok" in str(found)
    assert "without a digest, so not checked: bitstrata_report.json, tokenizer.json" in str(found)
    forget_config_digests(folder)
    found = bitstrata.inspect(folder, verify=True)
    assert (found.verified, found.unchecked) == (True, ("bitstrata_report.json", CONFIG, "tokenizer.json"))
    assert "every byte of the weights checked: ok" in str(found)
    assert bitstrata.inspect(folder).unchecked is None


def test_a_single_file_outranks_an_index_that_is_left_from_before(tmp_path):
    """As in transformers: `save_pretrained` into the same folder leaves the old index and its files."""
    save_checkpoint(tmp_path, {"a": random_weight(5, 70, seed=1)})
    old = CheckpointReader(tmp_path).layer("a")
    save_checkpoint(tmp_path / "new", {"a": random_weight(5, 70, seed=2)})
    tensors = {name: value.clone() for name, value in CheckpointReader(tmp_path / "new").state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path, verify=True)
    assert torch.equal(reader.layer("a").planes[0], tensors["a.plane_0"])
    assert not torch.equal(reader.layer("a").planes[0], old.planes[0])
    assert not reader.has_digests


@pytest.mark.parametrize("file", [CONFIG, INDEX, "model-plane-0.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(folder, file):
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(CheckpointError, match=f"{file} is not a file but a pipe"):
        CheckpointReader(folder)


def test_nesting_that_would_exhaust_a_stack_is_refused(folder):
    deep = b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}"
    replace_file(folder / CONFIG, deep)
    with pytest.raises(CheckpointError, match="nested more than 100 levels deep"):
        CheckpointReader(folder)


def reading(folder):
    """What a checkpoint's tensors and numbers are."""
    reader = CheckpointReader(folder, verify=True)
    return reader.state_dict(), bitstrata.inspect(folder, verify=True), validate(folder)


STATES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_reading_does_not_depend_on_the_state_of_the_callers_torch(folder, state, dtype):
    tensors, inspected, problems = reading(folder)
    torch.set_default_dtype(dtype)
    try:
        with STATES[state]():
            found = reading(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found[1:] == (inspected, problems)
    for name, tensor in tensors.items():
        assert found[0][name].dtype == tensor.dtype
        assert torch.equal(found[0][name], tensor), name
