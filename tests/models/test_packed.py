"""Sources in few bits: fp8 with block scales and MXFP4 are read as the numbers they stand for, or refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import sweep
import torch
from safetensors.torch import load_file, save_file
from shrunk import shrunk
from tiny_models import tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import bitstrata
from bitstrata.errors import ModelError, PreflightError
from bitstrata.models import SourceModel
from bitstrata.models.config import causal_class
from bitstrata.models.packed import Converted, find_packed
from bitstrata.models.source_files import bind

BLOCK = (16, 32)
FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
NAMES = {torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}


def fp8(weight: Tensor, block: tuple[int, int] = BLOCK) -> tuple[Tensor, Tensor]:
    """Numbers and a scale a block."""
    rows, columns = weight.shape[-2:]
    grid = -(-rows // block[0]), -(-columns // block[1])
    scales = torch.empty(*weight.shape[:-2], *grid)
    numbers = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for i in range(grid[0]):
        for j in range(grid[1]):
            place = (..., slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scale = weight[place].abs().amax((-2, -1)) / 448
            scales[..., i, j] = scale
            numbers[place] = (weight[place] / scale[..., None, None]).to(torch.float8_e4m3fn)
    return numbers, scales


def exact(numbers: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Element by element, float64."""
    result = numbers.double()
    for row in range(numbers.shape[-2]):
        for column in range(numbers.shape[-1]):
            result[..., row, column] *= scales[..., row // block[0], column // block[1]].double()
    return result


def read(tensors: dict[str, Tensor], name: str, settings: dict[str, Any], step: int) -> Tensor:
    """`name` as packed.py reads it, `step` rows at a time."""
    specs = {key: (NAMES[value.dtype], tuple(value.shape)) for key, value in tensors.items()}
    found = find_packed(specs, settings)[name]

    def rows(key: str, start: int, stop: int) -> Tensor:
        return tensors[key][start:stop] if tensors[key].dim() else tensors[key]

    count = found.shape[0]
    parts = [found.rows(start, min(start + step, count), rows) for start in range(0, count, step)]
    result = torch.cat(parts)
    assert result.shape == found.shape
    return result


@pytest.mark.parametrize("shape", [(40, 70), (32, 64), (3, 24, 40)], ids=str)
@pytest.mark.parametrize("step", [1, 7, 100])
def test_fp8_with_block_scales_is_exact_to_the_last_bit_of_fp32(shape: tuple[int, ...], step: int) -> None:
    numbers, scales = fp8(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    found = read({"a.weight": numbers, "a.weight_scale_inv": scales}, "a.weight", {"weight_block_size": BLOCK}, step)
    assert torch.equal(found, exact(numbers, scales, BLOCK).float())
    if shape == (32, 64):
        theirs = Fp8Dequantize(None)._dequantize_one(numbers, scales, output_dtype=torch.float32)
        assert torch.equal(found, theirs)


@pytest.mark.parametrize("kind", ["tensor", "one", "row", "even", "bf16", "exponent"])
def test_fp8_with_other_scales(kind: str) -> None:
    numbers = torch.randn(24, 40, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    grid, block = {"row": ((24, 1), (1, 40)), "even": ((4, 5), (6, 8))}.get(kind, ((2, 2), BLOCK))
    scales = torch.rand(grid, generator=torch.Generator().manual_seed(2)) + 0.5
    settings = {} if kind == "even" else {"weight_block_size": list(BLOCK)}
    stored = scales
    if kind in ("tensor", "one"):
        stored, scales, block = scales[0, 0].reshape(() if kind == "tensor" else (1,)), scales[:1, :1], (24, 40)
    if kind == "bf16":
        stored = scales.bfloat16()
        scales = stored.float()
    if kind == "exponent":
        stored = torch.tensor([[120, 127], [130, 126]], dtype=torch.uint8)
        scales = 2.0 ** (stored.float() - 127)
    found = read({"a.weight": numbers, "a.weight_scale": stored}, "a.weight", settings, 5)
    assert torch.equal(found, exact(numbers, scales, block).float())


@pytest.mark.parametrize("step", [1, 2, 9])
def test_mxfp4_is_exact_and_lies_as_transformers_has_it(step: int) -> None:
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 10, 2), generator=generator, dtype=torch.uint8)
    found = read({"e.up_blocks": blocks, "e.up_scales": scales}, "e.up", {}, step)
    expected = torch.empty(3, 64, 10, dtype=torch.float64)
    for expert in range(3):
        for row in range(10):
            for column in range(64):
                byte = int(blocks[expert, row, column // 32, column % 32 // 2])
                code = byte >> 4 if column % 2 else byte & 15
                number = FP4[code & 7] * (-1 if code & 8 else 1)
                expected[expert, column, row] = number * 2.0 ** (int(scales[expert, row, column // 32]) - 127)
    assert torch.equal(found.double(), expected)
    assert torch.equal(found.bfloat16(), convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16))


def of_parts(model_type: str, stored: dict[str, Tensor]) -> dict[str, Converted]:
    """How a tiny model of this type is made of the tensors in `stored`."""
    config = shrunk(model_type)
    with torch.device("meta"):
        model = causal_class(config)[0](config)
    return bind(model, stored, {}, lambda name: (stored[name].dtype, tuple(stored[name].shape)))[1]


@pytest.mark.parametrize("step", [1, 3, 4, 20])
def test_what_is_put_together_is_read_in_any_stretch(step: int) -> None:
    base = "model.layers.0.linear_attn"
    rows = {"q": 4, "k": 1, "v": 5}
    stored = {f"{base}.{part}_conv1d.weight": torch.randn(count, 1, 2) for part, count in rows.items()}
    found = of_parts("olmo_hybrid", stored)
    assert found.keys() == {f"{base}.conv1d.weight"}
    (tensor,) = found.values()
    read = [
        tensor.rows(start, min(start + step, 10), lambda name, first, last: stored[name][first:last])
        for start in range(0, 10, step)
    ]
    assert (tensor.shape, tensor.dtype) == ((10, 1, 2), torch.float32)
    assert torch.equal(torch.cat(read), torch.cat(list(stored.values())))


@pytest.mark.parametrize("step", [1, 2, 7, 32])
def test_what_is_split_and_turned_is_read_in_any_stretch(step: int) -> None:
    name = "vision_tower.encoder.blocks.0.wqkv"
    stored = {f"{name}.weight": torch.randn(192, 8).bfloat16(), f"{name}.bias": torch.randn(192)}
    found = of_parts("kimi_k25", stored)
    assert len(found) == 6
    base = "model.vision_tower.layers.0.attn"
    # within each of 4 heads, pairs that turn together lie 8 apart instead of side by side
    order = torch.arange(64).view(4, 8, 2).transpose(1, 2).flatten()
    for index, part in enumerate("qkv"):
        for end in ("weight", "bias"):
            tensor = found[f"{base}.{part}_proj.{end}"]
            whole = stored[f"{name}.{end}"][64 * index : 64 * (index + 1)]
            read = [
                tensor.rows(start, min(start + step, 64), lambda name, first, last: stored[name][first:last])
                for start in range(0, 64, step)
            ]
            assert (tensor.shape, tensor.dtype) == (tuple(whole.shape), whole.dtype)
            assert torch.equal(torch.cat(read), whole if part == "v" else whole[order])


def test_what_cannot_be_split_as_the_config_says_is_refused_by_name() -> None:
    name = "vision_tower.encoder.blocks.0.wqkv.bias"
    with pytest.raises(ModelError, match=f"{name} \\[21\\] cannot be made into model.vision_tower"):
        of_parts("kimi_k25", {name: torch.zeros(21)})


@pytest.mark.parametrize("name", ["kimi_k25", "mistral_large4", "molmo2", "unlimited_ocr"])
def test_towers_that_are_stored_in_another_form_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, _ = sweep.build(name)
    model.save_pretrained(tmp_path / "source")
    stored = load_file(tmp_path / "source" / "model.safetensors").keys()
    assert stored != model.state_dict().keys()
    report = bitstrata.quantize(tmp_path / "source", tmp_path / "out", bits=8, method="rtn", group_size=16)
    assert not any("not part of the model" in note for note in report.notes)
    ours = bitstrata.load(tmp_path / "out")
    theirs = type(model).from_pretrained(tmp_path / "out")
    theirs.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    kept = {key: value for key, value in model.state_dict().items() if "vision" in key or "projector" in key}
    assert any("vision" in key for key in kept)
    for loaded in (ours, theirs, again):
        found = loaded.state_dict()
        assert [key for key, value in kept.items() if not torch.equal(found[key], value)] == []
    planes = [key for key in theirs.state_dict() if key not in model.state_dict()]
    assert planes
    assert all(torch.equal(theirs.state_dict()[key], again.state_dict()[key]) for key in planes)


def test_what_is_split_may_be_in_few_bits(tmp_path: Path) -> None:
    model, _ = sweep.build("qianfan_ocr")
    source = tmp_path / "source"
    model.save_pretrained(source)
    stored = load_file(source / "model.safetensors")
    fused = "vision_model.encoder.layers.0.attn.qkv.weight"
    numbers, scales = fp8(stored[fused])
    stored |= {fused: numbers, f"{fused}_scale_inv": scales}
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16", "quantization_config": settings}
    (source / "config.json").write_text(json.dumps(config))
    bitstrata.quantize(source, tmp_path / "out", bits=8, method="rtn", group_size=16)
    kept = load_file(tmp_path / "out" / "model-common.safetensors")
    expected = exact(numbers, scales, BLOCK).float().bfloat16()
    base = "model.vision_tower.layers.0.attention"
    assert torch.equal(torch.cat([kept[f"{base}.{part}_proj.weight"] for part in "qkv"]), expected)


@pytest.mark.parametrize("dropped", [None, "k_conv1d"])
def test_a_convolution_that_is_stored_in_pieces_is_put_together(dropped: str | None, tmp_path: Path) -> None:
    model, _ = sweep.build("olmo_hybrid")
    model.save_pretrained(tmp_path / "source")
    stored = load_file(tmp_path / "source" / "model.safetensors")
    name = "model.layers.0.linear_attn.conv1d.weight"
    assert name not in stored
    if dropped is not None:
        kept = {key: value for key, value in stored.items() if dropped not in key}
        save_file(kept, tmp_path / "source" / "model.safetensors", {"format": "pt"})
        with pytest.raises(PreflightError, match=f"stores no tensor for {name}"):
            bitstrata.quantize(tmp_path / "source", tmp_path / "out", bits=8, method="rtn", group_size=16)
        return
    report = bitstrata.quantize(tmp_path / "source", tmp_path / "out", bits=8, method="rtn", group_size=16)
    assert not any("not part of the model" in note for note in report.notes)
    assert torch.equal(load_file(tmp_path / "out" / "model-common.safetensors")[name], model.state_dict()[name])


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a.weight": ("F8_E4M3", (32, 32))}, "a.weight is stored in fp8 without scales"),
        ({"a.weight": ("F8_E4M3", (32, 32)), "a.weight_scale_inv": ("F32", (3, 5))}, r"\[3, 5\] does not fit a.weight"),
        ({"a.weight": ("F8_E5M2", (32,)), "a.weight_scale_inv": ("F32", (2,))}, r"does not fit a.weight \[32\]"),
        ({"a_blocks": ("U8", (2, 4, 2, 16))}, "a_blocks is stored in MXFP4 without scales"),
        ({"a_blocks": ("U8", (2, 4, 2, 16)), "a_scales": ("U8", (2, 4, 3))}, "are not MXFP4"),
    ],
    ids=["none", "odd", "vector", "no exponents", "other exponents"],
)
def test_what_has_no_scales_that_fit_is_refused_by_name(tensors: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        find_packed(tensors, {})


def packed_llama(folder: Path) -> tuple[Path, Path]:
    """A bf16 model, and the same with its projections in fp8 over two shards that split weights from scales."""
    dense = tiny_llama(folder / "dense", num_key_value_heads=1)
    config = json.loads((dense / "config.json").read_text()) | {"dtype": "float32"}
    (dense / "config.json").write_text(json.dumps(config))
    tensors = load_file(dense / "model.safetensors")
    few = tiny_llama(folder / "few", num_key_value_heads=1)
    (few / "model.safetensors").unlink()
    stored: dict[str, Tensor] = {}
    for name, value in list(tensors.items()):
        if not name.endswith("_proj.weight"):
            stored[name] = value.bfloat16() if "norm" in name else value.half() if "lm_head" in name else value
            tensors[name] = stored[name].float()
            continue
        numbers, scales = fp8(value)
        stored |= {name: numbers, f"{name}_scale_inv": scales, name.replace("weight", "input_scale"): torch.ones(1)}
        tensors[name] = exact(numbers, scales, BLOCK).float()
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    files = {name: f"part-{int('scale' in name)}.safetensors" for name in stored}
    for file in set(files.values()):
        save_file({name: value for name, value in stored.items() if files[name] == file}, few / file)
    (few / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    settings = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
    (few / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return dense, few


def test_a_model_in_fp8_is_quantized_as_its_numbers_are(tmp_path: Path) -> None:
    dense, few = packed_llama(tmp_path)
    settings = {"bits": 3, "method": "rtn", "group_size": 16, "skip": "*.0.mlp.down_proj"}
    one, other = (bitstrata.quantize(folder, tmp_path / f"out-{folder.name}", **settings) for folder in (dense, few))
    assert not any("not part of the model" in note for note in other.notes)
    assert one.layer_error == other.layer_error
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [bitstrata.load(tmp_path / f"out-{folder.name}")(ids).logits for folder in (dense, few)]
        assert torch.equal(*logits)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out-few")
        assert torch.equal(theirs(ids).logits, logits[0])
    config = json.loads((tmp_path / "out-few" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitstrata"


def test_its_original_is_a_reference_too(tmp_path: Path) -> None:
    dense, few = packed_llama(tmp_path)
    bitstrata.quantize(few, tmp_path / "out", bits=8, method="rtn", group_size=16)
    (tmp_path / "text.txt").write_text("a cat and a dog " * 20)
    found = [
        bitstrata.evaluate(tmp_path / "out", tmp_path / "text.txt", reference=folder, seq_len=32).to_json()
        for folder in (dense, few)
    ]
    assert found[0]["reference"] == found[1]["reference"]
    assert found[1]["results"][0]["kld"] < 0.01


def test_one_that_is_linked_from_a_hub_cache(tmp_path: Path) -> None:
    _, few = packed_llama(tmp_path)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, path in enumerate(sorted(few.iterdir())):
        path.rename(blobs / str(index))
        os.symlink(f"../../blobs/{index}", snapshot / path.name)
    source = SourceModel(snapshot)
    source.skeleton()
    assert len(source.packed) == 14
    assert {"part-0.safetensors", "part-1.safetensors"} < source.digests().keys()
    bitstrata.quantize(snapshot, tmp_path / "out", bits=3, method="rtn", group_size=16)


def test_without_scales_it_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    _, few = packed_llama(tmp_path)
    index = json.loads((few / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if "scale" not in name}
    (few / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PreflightError, match="is stored in fp8 without scales"):
        bitstrata.quantize(few, tmp_path / "out", bits=3, method="rtn", group_size=16)
    assert not (tmp_path / "out").exists()
