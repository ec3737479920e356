"""Files appear whole or not at all, and equal tensors give equal bytes."""

from __future__ import annotations

import errno
import json

import pytest
import torch
from helpers import random_weight, save_checkpoint
from safetensors.torch import load_file

from bitstrata.checkpoint import TensorEntry, entries_of, is_checkpoint, remove_leftovers, write_checkpoint, write_json
from bitstrata.checkpoint.schema import SAFETENSORS_DTYPES, shard_of
from bitstrata.checkpoint.writer import write_safetensors
from bitstrata.errors import ResourceError, UsageError

CONFIG = {"quantization_config": {"quant_method": "bitstrata"}}


def failing(error: Exception, name: str = "a.scale_2") -> TensorEntry:
    """An entry whose tensor cannot be had when its bytes are due."""

    def read():
        raise error

    return TensorEntry(name, torch.float16, (1000,), read)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def tensors_of_every_dtype(seed):
    generator = torch.Generator().manual_seed(seed)
    named = {}
    for index, dtype in enumerate(SAFETENSORS_DTYPES.values()):
        shape = [(3, 5), (7,), (), (0,), (2, 0, 3), (1, 1)][index % 6]
        named[f"t{index}.{dtype}"] = torch.randint(0, 100, shape, generator=generator).to(dtype)
    return named


def test_the_safetensors_library_reads_our_files(tmp_path, seed):
    named = tensors_of_every_dtype(seed)
    path = tmp_path / "model.safetensors"
    write_safetensors(path, [TensorEntry.of(name, tensor) for name, tensor in named.items()], {"made": "by hand"})
    loaded = load_file(path)
    assert loaded.keys() == named.keys()
    for name, tensor in named.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert torch.equal(loaded[name], tensor), name


def test_header_is_padded_and_data_has_no_gaps(tmp_path, seed):
    named = tensors_of_every_dtype(seed)
    path = tmp_path / "model.safetensors"
    write_safetensors(path, [TensorEntry.of(name, tensor) for name, tensor in named.items()])
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    position = 0
    for entry in header.values():
        assert entry["data_offsets"][0] == position
        position = entry["data_offsets"][1]
    assert position == len(raw) - 8 - length


def test_equal_entries_give_equal_bytes_in_any_order(tmp_path, seed):
    entries = [TensorEntry.of(name, tensor) for name, tensor in tensors_of_every_dtype(seed).items()]
    first = write_safetensors(tmp_path / "first", entries)
    second = write_safetensors(tmp_path / "second", entries[::-1])
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert first == second


def test_non_contiguous_tensors_are_written_as_they_look(tmp_path, seed):
    tensor = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)).T[:, ::2]
    write_safetensors(tmp_path / "x", [TensorEntry.of("t", tensor)])
    assert torch.equal(load_file(tmp_path / "x")["t"], tensor)


def test_a_file_of_nothing_but_empty_tensors(tmp_path):
    write_safetensors(tmp_path / "x", [TensorEntry.of("a", torch.empty(0)), TensorEntry.of("b", torch.empty(4, 0))])
    assert {name: tuple(t.shape) for name, t in load_file(tmp_path / "x").items()} == {"a": (0,), "b": (4, 0)}


def test_each_tensor_is_asked_for_once(tmp_path):
    asked = []
    entry = TensorEntry("t", torch.float32, (2,), lambda: asked.append(1) or torch.ones(2))
    write_safetensors(tmp_path / "x", [entry])
    assert asked == [1]


@pytest.mark.parametrize(
    "tensor", [torch.ones(3), torch.ones(2, 1), torch.ones(2).half()], ids=["length", "dimensions", "dtype"]
)
def test_a_tensor_that_is_not_what_was_announced_is_refused_by_name(tmp_path, tensor):
    entry = TensorEntry("layer.scale", torch.float32, (2,), lambda: tensor)
    with pytest.raises(ValueError, match=r"layer\.scale: announced"):
        write_safetensors(tmp_path / "x", [entry])
    assert files(tmp_path) == []


def test_two_tensors_of_one_name_are_refused(tmp_path):
    entries = [TensorEntry.of("t", torch.ones(1)), TensorEntry.of("t", torch.ones(2))]
    with pytest.raises(ValueError, match="same name"):
        write_safetensors(tmp_path / "x", entries)
    assert files(tmp_path) == []


def test_a_writer_that_fails_midway_leaves_nothing_that_loads(tmp_path):
    entries = [*entries_of("b", random_weight(4, 70)), failing(RuntimeError("out of luck"))]
    with pytest.raises(RuntimeError, match="out of luck"):
        write_checkpoint(tmp_path, CONFIG, entries)
    assert "config.json" not in files(tmp_path)
    assert "model-bits-2.safetensors" not in files(tmp_path)
    assert not [name for name in files(tmp_path) if "tmp" in name]
    assert not is_checkpoint(tmp_path)


def test_a_writer_that_fails_over_an_old_checkpoint_leaves_nothing_that_loads(tmp_path):
    save_checkpoint(tmp_path, {"a": random_weight(4, 70)})
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, CONFIG, [failing(KeyboardInterrupt(), "z.plane_1")])
    assert not is_checkpoint(tmp_path)
    assert not [name for name in files(tmp_path) if "tmp" in name]


def test_a_failed_rewrite_of_one_file_keeps_the_old_one(tmp_path):
    path = tmp_path / "x"
    write_safetensors(path, [TensorEntry.of("t", torch.ones(3))])
    with pytest.raises(RuntimeError):
        write_safetensors(path, [failing(RuntimeError())])
    assert torch.equal(load_file(path)["t"], torch.ones(3))
    assert files(tmp_path) == ["x"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [(errno.ENOSPC, ResourceError), (errno.EDQUOT, ResourceError), (errno.EACCES, UsageError), (errno.EIO, UsageError)],
    ids=["disk-full", "quota", "permission", "other"],
)
def test_refusals_of_the_operating_system_say_what_to_do(tmp_path, code, expected):
    with pytest.raises(expected) as caught:
        write_safetensors(tmp_path / "x", [failing(OSError(code, "refused"))])
    assert caught.value.hint
    assert files(tmp_path) == []


def test_a_parent_that_is_a_file_cannot_hold_a_checkpoint(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        write_checkpoint(tmp_path / "file" / "out", CONFIG, [])


def test_config_is_written_after_everything_it_needs(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("bitstrata.checkpoint.writer.os.replace", lambda _, path: written.append(path.name))
    write_checkpoint(tmp_path, CONFIG, entries_of("a", random_weight(2, 33, bits=(1,))), report={"nll": 1.0})
    assert written == [
        "model-bits-1.safetensors",
        "model-plane-0.safetensors",
        "model.safetensors.index.json",
        "bitstrata_report.json",
        "config.json",
    ]


def test_index_lists_every_tensor_its_file_digest_and_the_total_size(tmp_path):
    weight = random_weight(4, 70)
    save_checkpoint(tmp_path, {"a": weight}, common={"norm": torch.ones(4)})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = [*(f"a.{name}" for name in weight.tensors()), "a.weight", "norm"]
    assert index["weight_map"] == {name: shard_of(name) for name in names}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weight.tensors().values()) + 16
    assert sorted(index["metadata"]["sha256"]) == [name for name in files(tmp_path) if name.startswith("model-")]


@pytest.mark.parametrize(
    ("tensor", "shard"),
    [
        ("model.layers.0.q_proj.plane_0", "model-plane-0.safetensors"),
        ("q.plane_7", "model-plane-7.safetensors"),
        ("q.scale_3", "model-bits-3.safetensors"),
        ("q.offset_3", "model-bits-3.safetensors"),
        ("q.table_8", "model-bits-8.safetensors"),
        ("q.weight", "model-common.safetensors"),
        ("plane_0.weight", "model-common.safetensors"),
        ("my_scale_3", "model-common.safetensors"),
        ("q.scale_3.bias", "model-common.safetensors"),
    ],
)
def test_which_file_holds_which_tensor(tensor, shard):
    assert shard_of(tensor) == shard


def test_remove_leftovers_of_a_killed_writer_touches_nothing_else(tmp_path):
    write_json(tmp_path / "config.json", {})
    (tmp_path / "model-plane-0.safetensors.bitstrata-tmp").write_bytes(b"half")
    remove_leftovers(tmp_path)
    assert files(tmp_path) == ["config.json"]
