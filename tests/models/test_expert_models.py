"""Whole models with experts: loading, bits of a plan, pages, saving, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers import with_decoded_weights
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import bitstrata
from bitstrata.checkpoint import CheckpointReader, validate
from bitstrata.errors import CheckpointError, PlanError, PreflightError, UsageError
from bitstrata.models import bytes_per_token
from bitstrata.nn import Experts

# ways to merge experts, and to store them: apart and merged; in test_architectures.py are more
MERGED = {
    "gpt_oss": {"head_dim": 16},
    "granitemoe": {},
    "llama4_text": {"head_dim": 16, "num_experts_per_tok": 1, "intermediate_size_mlp": 72, "moe_layers": [1]},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
}


def build(kind: str, seed: int = 0, **settings: object):
    shared = {
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 72, "vocab_size": 96, "max_position_embeddings": 64, "num_local_experts": 4,
        "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**shared, **settings})).float().eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def out(quantized) -> Path:
    return quantized("mixtral")[2]


@pytest.mark.parametrize("kind", MERGED)
def test_merged_experts_compute_what_their_decoded_weights_do(kind, tmp_path, seed):
    original = build(kind, seed, **MERGED[kind])
    original.save_pretrained(tmp_path / "source")
    bitstrata.quantize(tmp_path / "source", tmp_path / "out", bits="2,8", method="rtn", group_size=16)
    model = bitstrata.load(tmp_path / "out")
    ids = tokens(seed)
    with torch.no_grad():
        for bits in (2, 8):
            expected = with_decoded_weights(original, model, bits)(ids, use_cache=False).logits
            with model.bits_state.using(bits, "exact"):
                found = model(ids, use_cache=False).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert validate(tmp_path / "out") == []


def test_a_plan_may_name_an_expert(out):
    model = bitstrata.load(out)
    ids = tokens()
    layers = bitstrata.layers(model)
    name = "model.layers.1.mlp.experts.3.down_proj"
    assert layers[name] == (2, 3, 8)
    plan = dict.fromkeys(layers, 2) | {name: 8}
    with torch.no_grad(), model.bits_state.using(plan, "exact"):
        mixed = model(ids).logits
        held = bitstrata.load(out, plan=plan)
    with torch.no_grad(), held.bits_state.using(None, "exact"):
        assert torch.equal(held(ids).logits, mixed)
    with torch.no_grad(), model.bits_state.using(2, "exact"):
        assert not torch.equal(model(ids).logits, mixed)


def test_a_batch_may_mix_plans(out):
    model = bitstrata.load(out)
    ids = tokens()
    plan = dict.fromkeys(bitstrata.layers(model), 2) | {"model.layers.0.mlp.experts.1.gate_proj": 8}
    with torch.no_grad():
        for length in (24, 3):  # long calls, and as short ones as decoding makes
            mixed = model(ids[:, :length], bits=[plan, 3]).logits
            for row, bits in enumerate((plan, 3)):
                alone = model(ids[:, :length], bits=bits).logits[row]
                torch.testing.assert_close(mixed[row], alone, rtol=1e-4, atol=1e-4)


def test_a_resize_exchanges_single_experts(out):
    model = bitstrata.load(out, plan=2)
    ids = tokens()
    name = "model.layers.0.mlp.experts.2.up_proj"
    plan = dict.fromkeys(bitstrata.layers(model), 2) | {name: 3}
    done = model.resize(plan)
    assert done.layers == 1
    spec = CheckpointReader(out).spec
    planes = spec.layer_tensors(name)[f"{name}.plane_2"][1]
    assert (
        done.read
        == done.added
        == 4 * planes[0] * planes[1] + (spec.prefix_bytes(name, 3) - 3 * 4 * planes[0] * planes[1])
    )
    with torch.no_grad():
        assert torch.equal(model(ids).logits, bitstrata.load(out, plan=plan)(ids).logits)
        model.resize(2)
        assert torch.equal(model(ids).logits, bitstrata.load(out, plan=2)(ids).logits)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, copied(ids).logits)


def test_plans_of_experts_that_are_not_there_are_refused(out):
    model = bitstrata.load(out)
    plan = dict.fromkeys(bitstrata.layers(model), 2)
    with pytest.raises(UsageError, match=r"1 unknown \(for example model\.layers\.0\.mlp\.experts\.4\.up_proj\)"):
        model(tokens(), bits=plan | {"model.layers.0.mlp.experts.4.up_proj": 2})
    with pytest.raises(
        PlanError, match=r"names layer model\.layers\.0\.mlp\.experts\.4\.up_proj, which the model does"
    ):
        bitstrata.load(out, plan=plan | {"model.layers.0.mlp.experts.4.up_proj": 2})
    plan.pop("model.layers.0.mlp.experts.3.up_proj")
    with pytest.raises(PlanError, match=r"lacks layer model\.layers\.0\.mlp\.experts\.3\.up_proj"):
        bitstrata.load(out, plan=plan)


def test_state_dicts_are_merged_and_load_again(out):
    model, other = bitstrata.load(out), bitstrata.load(out, max_bits=8)
    state = model.state_dict()
    stored = CheckpointReader(out).state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    changed = {name: torch.flip(value, [0]) if ".experts." in name else value for name, value in state.items()}
    other.load_state_dict(changed)
    again = other.state_dict()
    assert all(torch.equal(again[name], changed[name]) for name in changed)


def test_a_model_of_other_experts_is_refused(out, tmp_path):
    def folder(name: str, **settings: int) -> Path:
        made = tmp_path / name
        made.mkdir()
        for path in out.iterdir():
            (made / path.name).write_bytes(path.read_bytes())
        config = json.loads((made / "config.json").read_text()) | settings
        (made / "config.json").write_text(json.dumps(config))
        return made

    with pytest.raises(
        CheckpointError, match=r"the checkpoint has 4 experts of \[72, 48\] and no bias, the model has 5"
    ):
        bitstrata.load(folder("more", num_local_experts=5))
    with pytest.raises(CheckpointError):
        bitstrata.load(folder("none", num_local_experts=0))


def test_a_config_that_names_experts_without_weights_is_refused(tmp_path):
    build("mixtral").save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"num_local_experts": 5}))
    with pytest.raises(PreflightError, match=r"stores no tensor for model\.layers\.0\.mlp\.experts\.4\.gate_proj"):
        bitstrata.quantize(tmp_path / "source", tmp_path / "out", bits=2, method="rtn", group_size=16)
    assert not (tmp_path / "out").exists()


def test_bytes_of_a_token_are_those_of_the_active_experts(out):
    model = bitstrata.load(out)
    spec = CheckpointReader(out).spec
    unquantized = sum(
        parameter.nbytes
        for name, parameter in model.named_parameters()
        if name != "model.embed_tokens.weight" and "weight" in name
    )
    assert bytes_per_token(model, 2) == spec.bytes_read(2) + unquantized


def test_experts_in_mxfp4_are_quantized_as_their_numbers_are(tmp_path):
    dense = tmp_path / "dense"
    build("gpt_oss", hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(dense)
    tensors, few = load_file(dense / "model.safetensors"), tmp_path / "few"
    few.mkdir()
    packed = dict(tensors)
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors[name].shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(122, 126, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
        del packed[name]
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    save_file(packed, few / "model.safetensors", {"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    (few / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    reports = [
        bitstrata.quantize(folder, tmp_path / f"{folder.name}-out", bits="2,4", method="rtn", group_size=32)
        for folder in (dense, few)
    ]
    assert reports[0].layer_error == reports[1].layer_error
    one, other = (CheckpointReader(tmp_path / f"{folder.name}-out").state_dict() for folder in (dense, few))
    assert all(torch.equal(one[name], other[name]) for name in one if ".experts." in name)


@pytest.mark.parametrize("skip", ["*.experts.*", "*.experts.1.*", "*.0.mlp.experts.*.down_proj"])
def test_skipped_experts_are_refused_before_anything_is_written(tmp_path, skip):
    build("mixtral").save_pretrained(tmp_path / "source")
    with pytest.raises(PreflightError, match="the experts of a layer are quantized together"):
        bitstrata.quantize(tmp_path / "source", tmp_path / "out", bits=2, method="rtn", group_size=16, skip=skip)
    assert not (tmp_path / "out").exists()


def test_a_router_may_be_named_in_skip(tmp_path):
    build("mixtral").save_pretrained(tmp_path / "source")
    settings = {"bits": 2, "method": "rtn", "group_size": 16, "skip": "*.mlp.gate"}
    report = bitstrata.quantize(tmp_path / "source", tmp_path / "out", **settings)
    routers = [entry for entry in report.left_out if entry["name"].endswith("mlp.gate.weight")]
    assert len(routers) == 2
    assert all("router" in entry["reason"] for entry in routers)


@pytest.mark.parametrize("bits", [3, "plan"])
def test_one_token_gives_the_same_whether_its_experts_are_called_or_not(out, bits):
    model = bitstrata.load(out)
    if bits == "plan":
        plan = dict.fromkeys(bitstrata.layers(model), 2)
        bits = {name: 2 + (index % 3 == 0) for index, name in enumerate(plan)}
    ids = tokens()[:1]
    with torch.no_grad():
        found = [model(ids[:, t : t + 1], bits=bits).logits for t in range(8)]
        calls = []
        for module in model.modules():
            if isinstance(module, Experts):
                for expert in range(module.expert_count):
                    module.get_submodule(f"{expert}.down_proj").register_forward_hook(lambda *_: calls.append(1))
        for t in range(8):
            assert torch.equal(model(ids[:, t : t + 1], bits=bits).logits, found[t])
    assert len(calls) == 8 * 2 * 2
