"""Every malformed checkpoint is a CheckpointError that names what is wrong; never anything else."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
from damage import (
    CONFIG,
    INDEX,
    drop_field,
    edit_index,
    edit_spec,
    edit_tensor,
    forget_digests,
    read_all,
    replace_file,
    set_field,
    set_layer,
    with_first,
    write,
)
from helpers import random_weight, save_checkpoint

from bitstrata.checkpoint import CheckpointReader, validate
from bitstrata.errors import CheckpointError

LAYERS = {"a": random_weight(5, 70, seed=1), "b": random_weight(3, 33, kind="codebook", seed=2)}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    save_checkpoint(folder, LAYERS, common={"norm.weight": torch.arange(4.0), "embed.weight": torch.ones(7, 3).half()})
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "out")


def remap(tensor, file):
    return edit_index(lambda index: index["weight_map"].update({tensor: file}))


def delete(file):
    return lambda folder: (folder / file).unlink()


SCALE_SHAPE = r"a\.scale_3 in model-bits-3\.safetensors: expected F16 \[3, 5, 3\], found "

DAMAGE = {
    "config-missing": (delete(CONFIG), r"config\.json is missing"),
    "config-empty": (write(CONFIG, b""), r"config\.json is not valid JSON"),
    "config-cut": (write(CONFIG, b'{"quantization_config": {'), r"config\.json is not valid JSON"),
    "config-not-utf8": (write(CONFIG, b"\xff\xfe{}"), r"config\.json is not valid JSON"),
    "config-a-list": (write(CONFIG, b"[]"), r"config\.json must hold a JSON object, found a list"),
    "config-nested-too-deep": (write(CONFIG, b"[" * 100_000), r"config\.json is not valid JSON"),
    "config-huge-number": (write(CONFIG, b'{"a": 1%s}' % (b"0" * 5000)), r"config\.json is not valid JSON"),
    "config-a-folder": (
        lambda folder: ((folder / CONFIG).unlink(), (folder / CONFIG).mkdir()),
        r"config\.json cannot be read",
    ),
    "config-of-another-method": (set_field("quant_method", "awq"), "is not a bitstrata checkpoint"),
    "config-without-quantization": (write(CONFIG, b"{}"), "is not a bitstrata checkpoint"),
    "version-of-the-future": (set_field("format_version", 5), "format_version 5; this bitstrata reads up to 4"),
    "version-a-string": (set_field("format_version", "1"), "format_version must be a positive integer, got '1'"),
    "version-true": (set_field("format_version", True), "format_version must be a positive integer"),
    "version-missing": (drop_field("format_version"), "format_version must be a positive integer, got None"),
    "version-zero": (set_field("format_version", 0), "format_version must be a positive integer"),
    "field-unknown": (set_field("colour", "red"), r"quantization_config\.colour: "),
    "field-missing": (drop_field("method"), r"quantization_config\.method: "),
    "layers-missing": (drop_field("layers"), r"quantization_config\.layers: "),
    "layer-field-unknown": (set_layer("colour", "red"), r"quantization_config\.layers\.a\.colour: "),
    "layer-not-an-object": (edit_spec(lambda s: s["layers"].update(a=3)), r"quantization_config\.layers\.a: "),
    "bits-unsorted": (set_field("bits", [3, 2, 4]), r"bits must be ascending.*got \[3, 2, 4\]"),
    "bits-twice": (set_field("bits", [2, 2, 3]), "bits must be ascending"),
    "bits-empty": (set_field("bits", []), "bits must be ascending"),
    "bits-zero": (set_field("bits", [0, 2]), "bits must be ascending"),
    "bits-nine": (set_field("bits", [2, 9]), "bits must be ascending"),
    "bits-a-string": (set_field("bits", "2-4"), r"quantization_config\.bits: "),
    "bits-a-float": (set_field("bits", [2.0]), r"quantization_config\.bits\.0: "),
    "layer-bits-empty": (set_layer("bits", []), "a: bits must be ascending"),
    "layer-bits-too-few": (set_layer("bits", [2, 4]), r"a: bits \[2, 4\] lack some of the model's bits"),
    "layer-bits-not-in-the-file": (set_layer("bits", [2, 3, 4, 5]), r"tensor a\.plane_4 is not listed"),
    "group-size-zero": (set_field("group_size", 0), r"quantization_config\.group_size: "),
    "group-size-absurd": (set_field("group_size", 10**30), r"quantization_config\.group_size: "),
    "group-size-a-string": (set_field("group_size", "32"), r"quantization_config\.group_size: "),
    "group-size-of-another-model": (set_field("group_size", 64), r"a\.scale_2 .*expected F16 \[2, 5, 2\]"),
    "scale-dtype-unknown": (set_field("scale_dtype", "float8"), r"quantization_config\.scale_dtype: "),
    "in-features-wrong": (set_layer("in_features", 170), r"a\.plane_0 .*expected I32 \[5, 6\], found I32 \[5, 3\]"),
    "in-features-absurd": (set_layer("in_features", 10**30), r"layers\.a\.in_features: "),
    "out-features-wrong": (set_layer("out_features", 6), r"a\.plane_0 .*expected I32 \[6, 3\]"),
    "scales-unknown": (set_layer("decoder", "vector"), r"layers\.a\.decoder: "),
    "scales-of-another-layer": (set_layer("decoder", "codebook"), r"tensor a\.table_2 is not listed"),
    "bias-promised-but-absent": (set_layer("bias", True), r"tensor a\.bias is not listed"),
    "layer-not-in-the-file": (
        edit_spec(lambda s: s["layers"].update(c={"in_features": 4, "out_features": 4})),
        r"tensor c\.plane_0 is not listed",
    ),
    "no-layers": (set_field("layers", {}), "layers must name at least one layer without a role"),
    "layer-gone-from-the-config": (
        edit_spec(lambda s: s["layers"].pop("b")),
        r"b\.plane_0 is stored, but",
    ),
    "guard-not-empty": (
        edit_tensor("a.weight", lambda _: torch.zeros(5, 70)),
        r"a\.weight .*\[0\], found \[5, 70\]",
    ),
    "guard-of-integers": (edit_tensor("a.weight", lambda _: torch.zeros(0).int()), r"a\.weight .*floating.*found I32"),
    "guard-of-eight-bits": (
        edit_tensor("a.weight", lambda _: torch.zeros(0).to(torch.float8_e4m3fn)),
        r"a\.weight .*expected a floating-point dtype, found F8_E4M3",
    ),
    "common-of-an-unknown-dtype": (
        edit_tensor("norm.weight", lambda tensor: tensor.to(torch.uint16)),
        r"norm\.weight in model-common\.safetensors: expected one of F64, .*found U16",
    ),
    "common-missing": (delete("model-common.safetensors"), r"model-common\.safetensors is missing"),
    "bias-that-nobody-promised": (
        lambda folder: (
            edit_tensor("norm.weight", lambda tensor: tensor)(folder),
            remap("a.bias", "model-common.safetensors")(folder),
        ),
        r"a\.bias is stored, but config\.json says that the layer has no bias",
    ),
    "index-of-a-file-that-is-not-there": (
        remap("norm.weight", "model-00009.safetensors"),
        r"model-00009\.safetensors is missing",
    ),
    "index-not-json": (write(INDEX, b"{"), r"index\.json is not valid JSON"),
    "index-a-number": (write(INDEX, b"7"), r"index\.json must hold a JSON object"),
    "index-without-map": (edit_index(lambda i: i.pop("weight_map")), "weight_map must map tensor names"),
    "index-map-a-list": (edit_index(lambda i: i.update(weight_map=[])), "weight_map must map tensor names"),
    "index-file-a-number": (remap("a.plane_0", 3), "weight_map must map tensor names"),
    "index-file-outside": (remap("a.plane_0", "../x.safetensors"), "is not a plain safetensors file name"),
    "index-file-absolute": (remap("norm.weight", "/etc/x.safetensors"), "is not a plain safetensors file name"),
    "index-file-parent": (remap("norm.weight", ".."), "is not a plain safetensors file name"),
    "index-file-empty": (remap("norm.weight", ""), "is not a plain safetensors file name"),
    "index-file-surrogate": (remap("norm.weight", "\ud800.safetensors"), "is not a plain safetensors file name"),
    "index-file-pickle": (remap("norm.weight", "pytorch_model.bin"), "is not a plain safetensors file name"),
    "index-metadata-a-list": (edit_index(lambda i: i.update(metadata=[])), r"metadata\.sha256 must map"),
    "index-digests-a-list": (edit_index(lambda i: i["metadata"].update(sha256=[1])), r"metadata\.sha256 must map"),
    "index-plane-missing": (edit_index(lambda i: i["weight_map"].pop("a.plane_1")), r"a\.plane_1 is not listed"),
    "index-wrong-shard": (
        remap("a.plane_1", "model-plane-0.safetensors"),
        r"tensor a\.plane_1 is missing from .*model-plane-0\.safetensors",
    ),
    "index-ghost": (
        remap("ghost", "model-common.safetensors"),
        r"tensor ghost is missing from .*model-common\.safetensors",
    ),
    "index-missing": (delete(INDEX), r"shard model\.safetensors is missing"),
    "plane-shard-missing": (delete("model-plane-2.safetensors"), r"shard model-plane-2\.safetensors is missing"),
    "bits-shard-missing": (delete("model-bits-3.safetensors"), r"shard model-bits-3\.safetensors is missing"),
    "common-shard-missing": (delete("model-common.safetensors"), r"shard model-common\.safetensors is missing"),
    "shard-empty": (write("model-bits-3.safetensors", b""), r"model-bits-3\.safetensors is not a whole"),
    "shard-of-text": (write("model-plane-0.safetensors", b"<html>404</html>"), r"model-plane-0\.safetensors is not"),
    "shard-a-folder": (
        lambda folder: ((folder / "model-bits-2.safetensors").unlink(), (folder / "model-bits-2.safetensors").mkdir()),
        r"model-bits-2\.safetensors is not a whole",
    ),
    "tensor-dropped": (edit_tensor("a.scale_3", lambda t: None), r"tensor a\.scale_3 is missing from .*model-bits-3"),
    "tensor-too-small": (edit_tensor("a.scale_3", lambda t: t[:, :4]), SCALE_SHAPE + r"F16 \[3, 4, 3\]"),
    "tensor-transposed": (edit_tensor("a.scale_3", lambda t: t.permute(1, 0, 2)), SCALE_SHAPE + r"F16 \[5, 3, 3\]"),
    "tensor-bfloat16": (edit_tensor("a.scale_3", torch.Tensor.bfloat16), SCALE_SHAPE + r"BF16 \[3, 5, 3\]"),
    "plane-int64": (edit_tensor("b.plane_0", torch.Tensor.long), r"b\.plane_0 .*found I64"),
    "scale-nan": (edit_tensor("a.scale_3", with_first(torch.nan)), r"a\.scale_3 in model-bits-3.* holds NaN"),
    "offset-infinite": (edit_tensor("a.offset_2", with_first(torch.inf)), r"a\.offset_2 .* holds NaN or infinity"),
    "table-infinite": (edit_tensor("b.table_4", with_first(-torch.inf)), r"b\.table_4 .* holds NaN or infinity"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_a_checkpoint_error_that_names_it(folder, damage):
    change, message = DAMAGE[damage]
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        read_all(folder)
    assert validate(folder)


def test_undamaged_it_reads(good):
    read_all(good, verify=True)
    assert validate(good) == []


def test_a_path_that_is_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        CheckpointReader(tmp_path / "nowhere")
    assert validate(tmp_path / "nowhere") == [f"{tmp_path / 'nowhere'} is not a folder"]


def test_damage_above_max_bits_is_not_looked_at(folder):
    (folder / "model-bits-4.safetensors").write_bytes(b"")
    assert CheckpointReader(folder, max_bits=3, verify=True).bits == (2, 3)


def test_finite_common_tensors_are_not_required(folder):
    """A model may hold -inf masks; only scales and tables must be finite."""
    edit_tensor("embed.weight", with_first(-torch.inf))(folder)
    assert CheckpointReader(folder).read("embed.weight").isinf().any()


def test_a_bias_of_the_wrong_length_is_named(tmp_path):
    save_checkpoint(tmp_path, LAYERS, common={"a.bias": torch.zeros(4)})
    set_layer("bias", True)(tmp_path)
    with pytest.raises(CheckpointError, match=r"a\.bias in model-common.*expected shape \[5\], found \[4\]"):
        CheckpointReader(tmp_path)


def test_a_bias_of_whole_numbers_is_named(tmp_path):
    save_checkpoint(tmp_path, LAYERS, common={"a.bias": torch.zeros(5, dtype=torch.int64)})
    set_layer("bias", True)(tmp_path)
    forget_digests(tmp_path)
    with pytest.raises(CheckpointError, match=r"a\.bias in model-common.*expected a floating-point dtype, found I64"):
        CheckpointReader(tmp_path)


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def test_a_file_cut_at_any_length_is_damaged(folder, seed):
    rng = random.Random(seed)
    for path in shards(folder):
        whole = path.read_bytes()
        for length in [0, 7, 8, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(6))]:
            replace_file(path, whole[:length])
            with pytest.raises(CheckpointError, match=path.name):
                read_all(folder)
        replace_file(path, whole)
    read_all(folder, verify=True)


def test_a_file_with_bytes_after_its_end_is_damaged(folder):
    for path in shards(folder):
        whole = path.read_bytes()
        replace_file(path, whole + b"\0")
        with pytest.raises(CheckpointError, match=path.name):
            read_all(folder)
        replace_file(path, whole)


def flips(data: bytes, rng: random.Random, count: int, limit: int | None = None):
    """`count` copies of `data`, each with one random bit flipped among the first `limit` bytes."""
    for _ in range(count):
        position, bit = rng.randrange(limit or len(data)), rng.randrange(8)
        yield data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :], (position, bit)


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
def test_flipped_bits_in_shards(folder, verify, seed):
    """Verified, a flip is always found. Unverified, it may pass, but it never crashes."""
    rng = random.Random(seed)
    for path in shards(folder):
        whole = path.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        for data, where in [*flips(whole, rng, 20), *flips(whole, rng, 60, header), *flips(whole, rng, 4, 8)]:
            replace_file(path, data)
            message = ""
            try:
                read_all(folder, verify=verify)
            except CheckpointError as error:
                message = error.message
            assert path.name in message or not verify, f"{path.name}: flipped bit {where}, {message or 'not noticed'}"
        replace_file(path, whole)


@pytest.mark.parametrize("file", [CONFIG, INDEX])
def test_flipped_bits_in_json_never_crash(folder, file, seed):
    whole = (folder / file).read_bytes()
    for data, where in flips(whole, random.Random(seed), 300):
        replace_file(folder / file, data)
        try:
            read_all(folder)
        except CheckpointError:
            pass
        except Exception as error:
            pytest.fail(f"{file}: flipped bit {where}: {error!r}")


def test_a_digest_that_is_missing_or_wrong_is_damage_only_when_verifying(folder):
    change = edit_index(lambda index: index["metadata"]["sha256"].pop("model-plane-1.safetensors"))
    change(folder)
    read_all(folder)
    with pytest.raises(CheckpointError, match=r"model-plane-1\.safetensors is damaged: its sha256"):
        read_all(folder, verify=True)
    forget_digests(folder)
    read_all(folder, verify=True)
