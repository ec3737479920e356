"""Files that vanish, shrink or change between load and resize: an error that names them, and a model that runs on."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

import bitstrata
from bitstrata.checkpoint import CheckpointReader, TensorEntry, write_safetensors
from bitstrata.errors import CheckpointError
from bitstrata.nn import bits_state

IDS = torch.tensor([[1, 5, 9, 13]])


@pytest.fixture
def folder(quantized, tmp_path):
    """A copy that a test may damage; rtn at bits 2, 3, 8."""
    return shutil.copytree(quantized("llama")[2], tmp_path / "copy")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def assert_unchanged(model, before):
    assert torch.equal(logits(model), before)
    assert set(bits_state(model).plan.values()) == {3}
    model.resize(2)  # what was read before can be read still
    model.resize(3)
    assert torch.equal(logits(model), before)


def loaded_at_3(folder):
    """A model at 3 bits whose reader has opened the files for 2 and 3 bits, and no others."""
    model = bitstrata.load(folder, plan=2)
    model.resize(3)
    return model


@pytest.mark.parametrize("missing", ["model-plane-7.safetensors", "model-bits-8.safetensors"])
def test_a_file_that_vanished_is_named(folder, missing):
    model = loaded_at_3(folder)
    before = logits(model)
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=missing):
        model.resize(8)
    assert_unchanged(model, before)


def test_files_that_no_plan_needs_yet_may_be_missing(folder):
    for index in range(3, 8):
        (folder / f"model-plane-{index}.safetensors").unlink()
    (folder / "model-bits-8.safetensors").unlink()
    model = bitstrata.load(folder, plan=3)
    with pytest.raises(CheckpointError, match="model-plane-3"):
        model.resize(8)
    with pytest.raises(CheckpointError, match="model-plane-3"):
        bitstrata.load(folder, plan=8)


@pytest.mark.parametrize("opened", [True, False])
def test_a_file_that_was_cut_off_is_named(folder, opened):
    model = loaded_at_3(folder)
    if opened:
        model.resize(8)
        model.resize(3)
    before = logits(model)
    path = folder / "model-plane-5.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="model-plane-5"):
        model.resize(8)
    assert_unchanged(model, before)


def test_a_file_that_was_written_over_is_named(folder):
    model = loaded_at_3(folder)
    model.resize(8)
    model.resize(3)
    before, path = logits(model), folder / "model-plane-5.safetensors"
    with open(path, "r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    os.utime(path, ns=(1, 1))  # clocks are coarse
    with pytest.raises(CheckpointError, match="changed"):
        model.resize(8)
    assert_unchanged(model, before)


def test_a_checkpoint_written_anew_is_not_mixed_with_the_old_one(folder, quantized):
    model = loaded_at_3(folder)
    before = logits(model)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="written anew"):
        model.resize(8)
    assert_unchanged(model, before)


def test_a_deleted_folder_takes_nothing_from_what_is_open(folder):
    model = bitstrata.load(folder, plan=8)
    model.resize(2)
    model.resize(3)
    before = logits(model)
    shutil.rmtree(folder)
    model.resize(8)
    assert_unchanged_after(model, before)


def assert_unchanged_after(model, before):
    model.resize(3)
    assert torch.equal(logits(model), before)


def test_scales_that_are_not_finite_are_named(folder):
    reader = CheckpointReader(folder)
    path = folder / "model-bits-8.safetensors"
    names = [name for name, file in reader.weight_map.items() if file == path.name]
    tensors = {name: reader.read(name).clone() for name in names}
    broken = next(name for name in names if ".scale_8" in name)
    tensors[broken].view(-1)[3] = float("inf")
    del reader
    write_safetensors(path, [TensorEntry.of(name, tensor) for name, tensor in tensors.items()])
    model = bitstrata.load(folder, plan=3)
    before = logits(model)
    with pytest.raises(CheckpointError, match=broken.replace(".", r"\.")):
        model.resize(8)
    assert_unchanged(model, before)


def test_tensors_of_another_shape_are_named(folder):
    reader = CheckpointReader(folder)
    path = folder / "model-plane-6.safetensors"
    names = [name for name, file in reader.weight_map.items() if file == path.name]
    entries = [TensorEntry.of(name, reader.read(name)[:-1].clone()) for name in names]
    del reader
    write_safetensors(path, entries)
    model = bitstrata.load(folder, plan=3)
    with pytest.raises(CheckpointError, match="plane_6"):
        model.resize(8)


def test_whole_files_are_compared_with_their_digests_when_asked(folder):
    path = folder / "model-plane-7.safetensors"
    with open(path, "r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    bitstrata.load(folder, plan=8)
    model = bitstrata.load(folder, plan=3, verify=True)
    before = logits(model)
    with pytest.raises(CheckpointError, match="model-plane-7"):
        model.resize(8)
    assert_unchanged(model, before)


def test_common_files_are_compared_with_their_digests_when_asked(folder):
    path = folder / "model-common.safetensors"
    with open(path, "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(bytes(8))
    with pytest.raises(CheckpointError, match="model-common"):
        bitstrata.load(folder, plan=3, verify=True)
    bitstrata.load(folder, plan=3)


def test_one_safetensors_file_without_an_index_is_read_page_by_page_too(quantized, tmp_path):
    whole = bitstrata.load(quantized("llama")[2])
    whole.save_pretrained(tmp_path / "saved")
    model = bitstrata.load(tmp_path / "saved", plan=2)
    for bits in (8, 3):
        model.resize(bits)
        with torch.no_grad():
            assert torch.equal(logits(model), whole(IDS, bits=bits).logits)


def test_running_out_of_memory_leaves_the_model_alone(folder, monkeypatch):
    model = loaded_at_3(folder)
    before, count = logits(model), iter(range(1000))
    layer = type(model.get_submodule(next(iter(bits_state(model).plan))))
    real = layer.with_pages

    def failing(self, *arguments):
        if next(count) == 5:
            raise MemoryError
        return real(self, *arguments)

    monkeypatch.setattr(layer, "with_pages", failing)
    with pytest.raises(MemoryError):
        model.resize(8)
    monkeypatch.undo()
    assert_unchanged(model, before)
