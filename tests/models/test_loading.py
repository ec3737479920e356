"""Loading: devices, dtypes, fewer planes, loud failures, and bits that travel with a call."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import bitstrata
from bitstrata.checkpoint import CheckpointReader
from bitstrata.errors import CheckpointError, ModelError, UnsupportedBitsError, UsageError
from bitstrata.models import BitstrataConfig, BitstrataQuantizer
from bitstrata.nn import PlaneLinear, bits_state
from bitstrata.plans import parse_target


@pytest.fixture
def out(quantized):
    return quantized("llama")[2]


@pytest.fixture
def ids():
    return torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}], ids=str)
def test_dtype_and_device_map_never_touch_planes_or_scales(dtype, device_map, out, ids):
    reference = bitstrata.load(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=dtype, device_map=device_map)
    expected = {key: value for key, value in reference.state_dict().items() if "plane_" in key or "_proj.s" in key}
    for key, value in expected.items():
        assert torch.equal(model.state_dict()[key], value), key
    with torch.no_grad():
        with bits_state(model).using(arithmetic="exact"):  # of these, float32 alone computes many rows so by itself
            logits = model(ids, bits=3).logits
        assert logits.dtype == dtype
        gap = (logits.float() - reference(ids, bits=3).logits).abs().max()
    assert gap <= {torch.float32: 0.0, torch.bfloat16: 1.0, torch.float16: 0.1}[dtype]


def test_without_our_import_loading_fails_instead_of_returning_random_layers(out):
    script = (
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(out)!r})\nprint('LOADED')"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode != 0
    assert "LOADED" not in result.stdout
    assert "mismatch" in (result.stdout + result.stderr).lower()


def test_max_bits_needs_only_the_files_of_the_prefix(out, ids, tmp_path):
    copied = shutil.copytree(out, tmp_path / "copy")
    for name in [f"model-plane-{index}.safetensors" for index in range(3, 8)] + ["model-bits-8.safetensors"]:
        (copied / name).unlink()
    model = bitstrata.load(copied, max_bits=3)
    assert bits_state(model).supported == (2, 3)
    assert not hasattr(model.model.layers[0].mlp.up_proj, "plane_3")
    with torch.no_grad():
        for bits in (2, 3):
            assert torch.equal(model(ids, bits=bits).logits, bitstrata.load(out)(ids, bits=bits).logits)
    with pytest.raises(UnsupportedBitsError, match="bits=8"):
        model(ids, bits=8)
    with pytest.raises(CheckpointError, match="missing"):
        bitstrata.load(copied)


def test_from_pretrained_names_a_missing_shard(out, tmp_path):
    copied = shutil.copytree(out, tmp_path / "copy")
    (copied / "model-plane-1.safetensors").unlink()
    with pytest.raises((CheckpointError, OSError), match=r"model-plane-1\.safetensors"):
        AutoModelForCausalLM.from_pretrained(copied)


def test_from_pretrained_names_a_tensor_of_the_wrong_shape(out, tmp_path):
    copied = shutil.copytree(out, tmp_path / "copy")
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["group_size"] = 16
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"scale_2 in model-bits-2\.safetensors: expected"):
        AutoModelForCausalLM.from_pretrained(copied)


def test_a_damaged_file_is_found_by_its_digest_when_asked(out, tmp_path):
    copied = shutil.copytree(out, tmp_path / "copy")
    path = copied / "model-plane-0.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model-plane-0\.safetensors is damaged"):
        bitstrata.load(copied, verify=True)
    with pytest.raises(CheckpointError, match=r"model-plane-0\.safetensors is damaged"):
        bitstrata.inspect(copied, verify=True)


def test_files_are_not_read_to_the_end_unless_that_is_asked_for(out, monkeypatch):
    """By default headers and sizes are checked; a digest would read every byte once more."""
    compared = []
    monkeypatch.setattr(CheckpointReader, "check_digest", lambda reader, file: compared.append(file))
    for arguments in ({}, {"max_bits": 3}, {"plan": 3}):
        bitstrata.load(out, **arguments)
    assert compared == []
    bitstrata.load(out, max_bits=2, verify=True)
    shards = {"common", "plane-0", "plane-1", "bits-2"}
    assert sorted(compared) == sorted(f"model-{shard}.safetensors" for shard in shards)


@pytest.mark.parametrize("arguments", [{}, {"max_bits": 2}, {"plan": 2}], ids=str)
@pytest.mark.parametrize("file", ["model-common", "model-plane-1", "model-bits-2"])
def test_a_file_that_lacks_its_end_is_found_without_digests(file, arguments, out, tmp_path):
    copied = shutil.copytree(out, tmp_path / "copy")
    path = copied / f"{file}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{file}.safetensors is not a whole safetensors file"):
        bitstrata.load(copied, **arguments)


def test_bits_are_restored_after_an_exception(out, ids):
    model = bitstrata.load(out, bits=3)
    with pytest.raises(UnsupportedBitsError) as caught:
        model(ids, bits=5)
    assert caught.value.hint == "supported bits: 2, 3, 8"
    with pytest.raises(TypeError):
        model(ids, bits=2, not_an_argument=object(), input_ids=ids)
    assert bits_state(model).value == 3


def test_two_models_do_not_affect_each_other(out, ids):
    first, second = bitstrata.load(out, bits=2), bitstrata.load(out, bits=8)
    with torch.no_grad():
        before = second(ids).logits
        with bitstrata.use_bits(first, 3):
            assert torch.equal(second(ids).logits, before)


def test_a_deep_copy_has_a_state_of_its_own(out, ids):
    model = bitstrata.load(out, bits=2)
    twin = copy.deepcopy(model)
    with bitstrata.use_bits(twin, 8):
        assert bits_state(model).value == 2
        states = {id(layer.bits_state) for layer in twin.modules() if isinstance(layer, PlaneLinear)}
        assert states == {id(bits_state(twin))}


def test_requests_of_one_batch_at_different_bits(out, ids):
    model = bitstrata.load(out)
    with torch.no_grad():
        mixed = model(ids, bits=torch.tensor([2, 8], dtype=torch.int8)).logits
        for row, bits in enumerate((2, 8)):
            torch.testing.assert_close(mixed[row], model(ids, bits=bits).logits[row], rtol=1e-5, atol=1e-5)


def test_a_plan_sets_bits_layer_by_layer(out, ids):
    model = bitstrata.load(out)
    names = list(bits_state(model).layers)
    with torch.no_grad():
        uniform = model(ids, bits=dict.fromkeys(names, 3)).logits
        assert torch.equal(uniform, model(ids, bits=3).logits)
        mixed = model(ids, bits={name: 2 if index % 2 else 8 for index, name in enumerate(names)}).logits
    assert not torch.equal(mixed, uniform)
    with pytest.raises(UsageError, match="plan does not fit"):
        model(ids, bits={names[0]: 2})


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks_at_every_bits(backend, out, ids):
    torch._dynamo.reset()
    model = bitstrata.load(out)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for bits in (2, 3, 8, 2):
            expected = model(ids, bits=bits, use_cache=False).logits
            torch.testing.assert_close(compiled(ids, bits=bits, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
        rows = torch.tensor([3, 2], dtype=torch.int8)
        expected = model(ids, bits=rows, use_cache=False).logits
        torch.testing.assert_close(compiled(ids, bits=rows, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("target", "expected"),
    [("out:3", ("out", 3)), ("out", ("out", None)), ("a:b", ("a:b", None)), ("user/model:4", ("user/model", 4))],
)
def test_target_with_bits(target, expected):
    assert parse_target(target) == expected


def test_what_is_not_a_checkpoint_is_refused(quantized, tmp_path):
    with pytest.raises(ModelError, match="no bitstrata checkpoint folder"):
        bitstrata.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="not a bitstrata checkpoint"):
        bitstrata.load(quantized("llama")[1])
    with pytest.raises(UsageError, match="not a device"):
        bitstrata.load(quantized("llama")[2], device="abacus")


def edit_json(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_tensor_that_is_missing_or_unknown_is_named(out, tmp_path):
    index = "model.safetensors.index.json"
    copied = shutil.copytree(out, tmp_path / "less")
    edit_json(copied / index, lambda content: content["weight_map"].pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"stores no tensor for model\.norm\.weight"):
        bitstrata.load(copied)
    copied = shutil.copytree(out, tmp_path / "more")
    edit_json(copied / "config.json", lambda content: content.update(num_hidden_layers=1, layer_types=None))
    with pytest.raises(CheckpointError, match=r"layers\.1"):
        bitstrata.load(copied)


def test_a_checkpoint_never_runs_code_of_its_own(out, tmp_path, monkeypatch):
    copied = shutil.copytree(out, tmp_path / "copy")
    (copied / "conf.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit_json(
        copied / "config.json",
        lambda content: content.update(model_type="evil", auto_map={"AutoConfig": "conf.Config"}),
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(CheckpointError):
        bitstrata.load(copied)
    assert not (tmp_path / "ran").exists()


def test_pickle_keeps_a_model_that_takes_bits(out, ids):
    model = bitstrata.load(out, bits=3)
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for bits in (2, 3):
            assert torch.equal(again(ids, bits=bits).logits, model(ids, bits=bits).logits)


@pytest.mark.parametrize("three", [np.int64(3), np.uint8(3), torch.tensor(3)], ids=repr)
def test_whole_numbers_of_other_libraries_are_bits(three, out, ids):
    model = bitstrata.load(out, bits=three)
    assert bits_state(model).value == 3
    assert bits_state(bitstrata.load(out, max_bits=three)).supported == (2, 3)
    paged = bitstrata.load(out, plan=three)
    assert bits_state(paged).supported == (3,)
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(bitstrata.load(out)(ids, bits=three).logits, expected)
        assert torch.equal(paged(ids, bits=three).logits, expected)
        paged.resize(three - 1)
        assert torch.equal(paged(ids).logits, model(ids, bits=2).logits)
        settings = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(ids, bits=three, **settings), model.generate(ids, bits=3, **settings))


@pytest.mark.parametrize("value", [3.0, "3", True, np.float32(3), torch.tensor(3.0)], ids=repr)
def test_what_is_no_whole_number_is_refused(value, out):
    for name in ("bits", "max_bits"):
        with pytest.raises(UsageError, match="bits"):
            bitstrata.load(out, **{name: value})


@pytest.mark.parametrize("bits", [2, torch.tensor([2, 8])], ids=["2", "rows"])
def test_bits_of_one_call_do_not_reach_blocks_that_run_again_in_the_backward_pass(bits, out, ids):
    model = bitstrata.load(out)
    expected = model(ids, bits=bits, use_cache=False).logits.detach()
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(UsageError, match="gradient checkpointing") as caught:
        model(ids, bits=bits, use_cache=False)
    assert "use_bits" in caught.value.hint
    ran = []
    layer = model.model.layers[1].mlp.up_proj
    layer.register_forward_pre_hook(lambda module, _: ran.append(bits_state(model).value))
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    with bitstrata.use_bits(model, bits):
        logits = model(inputs_embeds=embeddings, use_cache=False).logits
        logits.sum().backward()
    torch.testing.assert_close(logits, expected)
    assert len(ran) == 2, "once forward and once again"
    for value in ran:
        assert torch.equal(torch.as_tensor(value).flatten().unique(), torch.as_tensor(bits).unique())
    with torch.no_grad():
        torch.testing.assert_close(model(ids, bits=bits, use_cache=False).logits, expected)


def test_a_tensor_of_another_shape_is_noticed_whatever_transformers_compares(out):
    config = AutoConfig.from_pretrained(out)
    quantizer = BitstrataQuantizer(BitstrataConfig(**config.quantization_config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    quantizer._process_model_before_weight_loading(model)
    model.model.norm.weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \[3\] in the files, \[48\] in the model"):
        quantizer._process_model_after_weight_loading(model)
