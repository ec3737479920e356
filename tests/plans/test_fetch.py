"""Single pages of a checkpoint: the tensors that the whole reader gives, and only their bytes."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import random_weight, save_checkpoint

from bitstrata.checkpoint import CheckpointReader
from bitstrata.errors import CheckpointError
from bitstrata.planes.weights import scales_tensors
from bitstrata.plans import PageReader

BITS = (2, 3, 6)


@pytest.fixture(params=["affine", "affine8", "codebook"])
def folder(request, tmp_path, seed):
    layers = {name: random_weight(40, 70, BITS, 32, request.param, seed + at) for at, name in enumerate("ab")}
    save_checkpoint(tmp_path, layers, bits=BITS)
    return tmp_path


def reader_of(folder, **options):
    return PageReader(CheckpointReader(folder, paged=True), **options)


def test_pages_are_the_tensors_of_the_whole_layer(folder):
    whole, reader = CheckpointReader(folder), reader_of(folder)
    for layer in "ab":
        expected, held = whole.layer(layer), 0
        for bits in BITS:
            planes, scales = reader.pages(layer, held, bits)
            assert all(torch.equal(*pair) for pair in zip(planes, expected.planes[held:bits], strict=True))
            found, wanted = (scales_tensors(item, bits) for item in (scales, expected.scales[bits]))
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
            held = bits
    planes, _ = reader.pages("a", 6, 3)
    assert planes == []


def test_bytes_read_are_those_of_the_pages(folder):
    reader, total = reader_of(folder), 0
    for held, bits in ((0, 3), (3, 6), (6, 2), (2, 2)):
        reader.pages("b", held, bits)
        total += reader.page_bytes("b", held, bits)
        assert reader.bytes_read == total
    assert reader.page_bytes("b", 3, 6) > reader.page_bytes("b", 6, 6) == reader.page_bytes("b", 7, 6)


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_nothing_stays_mapped(folder):
    reader = reader_of(folder)
    kept = reader.pages("a", 0, 6)
    mapped = re.findall(r"\S+\.safetensors", Path("/proc/self/maps").read_text())
    here = [path for path in mapped if path.startswith(f"{folder}/")]  # other tests may hold models of theirs
    assert not [path for path in here if "plane" in path or "bits" in path]
    assert kept


def test_a_paged_reader_looks_at_no_pages(folder):
    for path in folder.glob("model-*.safetensors"):
        if "common" not in path.name:
            path.unlink()
    reader = CheckpointReader(folder, paged=True)
    assert not [name for name in reader.state_dict() if "plane" in name]
    with pytest.raises(CheckpointError, match="model-plane-0"):
        PageReader(reader).pages("a", 0, 2)
    with pytest.raises(CheckpointError, match="missing"):
        CheckpointReader(folder)


def test_a_tensor_that_the_index_does_not_list(folder):
    reader = CheckpointReader(folder, paged=True)
    del reader.weight_map["a.plane_1"]
    with pytest.raises(CheckpointError, match=r"a\.plane_1 is not listed"):
        PageReader(reader).pages("a", 0, 2)


def test_a_tensor_that_its_file_lacks(folder):
    reader = CheckpointReader(folder, paged=True)
    reader.weight_map["a.plane_1"] = "model-plane-0.safetensors"
    with pytest.raises(CheckpointError, match=r"a\.plane_1 is missing from"):
        PageReader(reader).pages("a", 0, 2)


def test_the_files_stay_readable_when_the_folder_goes(folder):
    reader = reader_of(folder)
    before = reader.pages("a", 0, 6)[0]
    shutil.rmtree(folder)
    assert all(torch.equal(*pair) for pair in zip(reader.pages("a", 0, 6)[0], before, strict=True))
    with pytest.raises(CheckpointError, match="written anew"):
        reader.pages("a", 6, 2)
