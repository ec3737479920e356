"""A source model is what transformers loads from the same folder, or it is refused in words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM

import bitstrata
from bitstrata.checkpoint import CheckpointReader
from bitstrata.errors import BitstrataError, ModelError, PreflightError
from bitstrata.models import SourceModel, discover

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, torch.Tensor]


def weights_of(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def store(folder: Path, tensors: Tensors, file: str = "model.safetensors") -> None:
    (folder / file).parent.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / file, {"format": "pt"})


def write_index(folder: Path, files: dict[str, str], file: str = "model.safetensors.index.json") -> None:
    (folder / file).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def configure(folder: Path, **changes: Any) -> None:
    """Change config.json; None takes a field out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    left = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(left))


def quantize(source: Path, output: Path, **settings: Any) -> bitstrata.Report:
    return bitstrata.quantize(source, output, bits=8, method="rtn", group_size=16, **settings)


def refusal(source: Path) -> str:
    output = source.parent / "refused"
    with pytest.raises(PreflightError) as caught:
        quantize(source, output)
    assert not output.exists()
    assert len(caught.value.problems) == 1
    return f"{caught.value.problems[0].message} hint: {caught.value.problems[0].hint}"


def assert_is_quantized(source: Path, output: Path) -> None:
    """At 8 bits the checkpoint's logits are those of what transformers loads, up to rounding."""
    ids = torch.randint(3, 60, (2, 20))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(ids).logits
        for model in (bitstrata.load(output), AutoModelForCausalLM.from_pretrained(output)):
            wrong = (model(ids).logits - expected).norm() / expected.norm()
            assert float(wrong) < 0.02


@pytest.mark.parametrize("head_bits", [None, 8])
@pytest.mark.parametrize("stored", ["both, different", "both, equal", "head alone", "embedding alone"])
def test_ties_are_what_transformers_makes_of_the_stored_tensors(
    stored: str, head_bits: int | None, tmp_path: Path
) -> None:
    source = tiny_llama(tmp_path / "source", tie_word_embeddings=True)
    tensors = weights_of(source)
    assert HEAD not in tensors
    embedding = tensors[EMBEDDING]
    tensors[HEAD] = torch.randn_like(embedding) * 0.15 if stored == "both, different" else embedding.clone()
    if stored.endswith("alone"):
        del tensors[EMBEDDING if stored.startswith("head") else HEAD]
    store(source, tensors)
    report = quantize(source, tmp_path / "out", head_bits=head_bits)
    assert_is_quantized(source, tmp_path / "out")
    untied = stored == "both, different"
    assert any("both are kept" in note for note in report.notes) == untied
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is not untied
    assert not any("not part of the model" in note for note in report.notes)


def test_ties_are_compared_in_the_dtype_that_is_loaded(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", tie_word_embeddings=True)
    tensors = {name: value.bfloat16() for name, value in weights_of(source).items()}
    tensors[HEAD] = tensors[EMBEDDING].float() * (1 + 2**-12)  # the same in bf16
    store(source, tensors)
    configure(source, dtype="bfloat16")
    model = SourceModel(source)
    model.skeleton()
    assert model.untied == []
    configure(source, dtype="float32")
    model = SourceModel(source)
    model.skeleton()
    assert model.untied == [(HEAD, EMBEDDING)]


def shifted(tensors: Tensors) -> Tensors:
    return {name: value + 0.1 * torch.randn_like(value) for name, value in tensors.items()}


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    tensors = weights_of(source)
    store(source, shifted(tensors), "model-00001-of-00001.safetensors")
    write_index(source, dict.fromkeys(tensors, "model-00001-of-00001.safetensors"))
    quantize(source, tmp_path / "out")
    assert_is_quantized(source, tmp_path / "out")
    (source / "model-00001-of-00001.safetensors").unlink()
    quantize(source, tmp_path / "again")
    assert_is_quantized(source, tmp_path / "again")


def test_the_file_that_the_config_names_goes_before_all(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    store(source, shifted(weights_of(source)), "other.safetensors")
    configure(source, transformers_weights="other.safetensors")
    quantize(source, tmp_path / "out")
    assert_is_quantized(source, tmp_path / "out")
    assert "transformers_weights" not in json.loads((tmp_path / "out" / "config.json").read_text())
    configure(source, transformers_weights="gone.safetensors")
    assert "gone.safetensors, which its config names" in refusal(source)
    configure(source, transformers_weights="../gone.safetensors")
    assert "is not a file name" in refusal(source)


def test_shards_may_lie_in_sub_folders_and_hold_more_than_the_index_lists(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    tensors = weights_of(source)
    (source / "model.safetensors").unlink()
    first = {name: value for name, value in tensors.items() if "layers.1" not in name}
    rest = {name: value for name, value in tensors.items() if "layers.1" in name}
    twice = "model.norm.weight"
    store(source, first, "a.safetensors")
    store(source, {**rest, twice: tensors[twice] * 3}, "parts/b.safetensors")
    listed = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(rest, "parts/b.safetensors")
    del listed["lm_head.weight"]
    write_index(source, listed)
    quantize(source, tmp_path / "out")
    assert_is_quantized(source, tmp_path / "out")
    assert torch.equal(CheckpointReader(tmp_path / "out").read(twice), tensors[twice] * 3)


def test_weights_under_other_names_are_named(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    (source / "model.safetensors").rename(source / "model.fp16.safetensors")
    assert "has no model.safetensors" in refusal(source)
    assert "there is model.fp16.safetensors" in refusal(source)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module", "base_model.model"])
def test_the_names_of_a_wrapper_are_one_problem_that_says_so(wrapper: str, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    store(source, {f"{wrapper}.{name}": value for name, value in weights_of(source).items()})
    said = refusal(source)
    assert f"such as {wrapper}." in said
    assert "save" in said.partition("hint: ")[2]
    assert "download" not in said


def test_missing_tensors_are_one_problem_that_says_what_there_is(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    tensors = weights_of(source)
    store(source, {name.replace("mlp", "ffn"): value for name, value in tensors.items()})
    said = refusal(source)
    assert "stores no tensor for model.layers.0.mlp.gate_proj.weight" in said
    assert "and 3 more" in said
    assert "it stores model.layers.0.ffn.down_proj.weight" in said


def test_an_adapter_is_sent_to_be_merged(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere/base"}')
    assert "holds an adapter" in refusal(source)
    assert "--merge-adapter" in refusal(source)
    (source / "config.json").unlink()
    assert "is an adapter, not a model" in refusal(source)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("name", DTYPES)
def test_the_dtype_is_the_sources_where_its_config_says_none(make: Any, name: str, tmp_path: Path) -> None:
    source, out = make(tmp_path / "source"), tmp_path / "out"
    store(source, {key: value.to(DTYPES[name]) for key, value in weights_of(source).items()})
    configure(source, dtype=None)
    assert "dtype" not in json.loads((source / "config.json").read_text())
    quantize(source, out)
    assert AutoModelForCausalLM.from_pretrained(source).dtype == DTYPES[name]
    for _ in range(2):
        assert bitstrata.load(out).dtype == DTYPES[name]
        loaded = AutoModelForCausalLM.from_pretrained(out)
        assert loaded.dtype == DTYPES[name]
        configure(out, dtype=None)  # as checkpoints were written once
    loaded.save_pretrained(tmp_path / "again")
    assert bitstrata.load(tmp_path / "again").dtype == DTYPES[name]
    assert AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64).dtype == torch.float64
    kind = getattr(transformers, json.loads((out / "config.json").read_text())["architectures"][0])
    assert kind.from_pretrained(out, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_of_mixed_dtypes_the_first_in_the_file_counts_as_for_transformers(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    mixed = {
        name: value.bfloat16() if index % 2 else value.half()
        for index, (name, value) in enumerate(weights_of(source).items())
    }
    store(source, mixed)
    configure(source, dtype=None)
    expected = AutoModelForCausalLM.from_pretrained(source).dtype
    assert SourceModel(source).dtype == expected
    quantize(source, tmp_path / "out")
    assert bitstrata.load(tmp_path / "out").dtype == expected


TEXT: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 72, "vocab_size": 96, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def gemma3_with_images(folder: Path, **changes: Any) -> Path:
    """A Gemma-3 with a vision tower as deep as its text model."""
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 16, **changes},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("nested", [True, False], ids=["dtype missing", "dtype of the whole alone"])
def test_a_vision_tower_of_equal_depth_is_not_touched(nested: bool, tmp_path: Path) -> None:
    source = gemma3_with_images(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["text_config"].pop("dtype", None)
    if nested:
        config.pop("dtype")
    (source / "config.json").write_text(json.dumps(config))
    report = quantize(source, tmp_path / "out")
    layers = CheckpointReader(tmp_path / "out").spec.layers
    assert len(layers) == 14
    assert all(name.startswith("model.language_model.layers.") for name in layers)
    assert any("vision_tower" in entry["name"] for entry in report.left_out)
    assert_is_quantized(source, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == written["text_config"]["dtype"] == "float32"


def test_without_a_text_model_of_its_depth_nothing_else_is_taken(tmp_path: Path) -> None:
    source = SourceModel(gemma3_with_images(tmp_path / "source"))
    model = source.skeleton()
    model.model.language_model.layers.append(torch.nn.Identity())
    with pytest.raises(ModelError, match="in the text model of Gemma3ForConditionalGeneration"):
        discover(model)


def saved(folder: Path, kind: str, config: transformers.PreTrainedConfig) -> Path:
    getattr(transformers, kind)(config).save_pretrained(folder)
    return folder


BERT = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
BART: dict[str, Any] = {
    "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 72, "decoder_ffn_dim": 72, "vocab_size": 96,
    "max_position_embeddings": 64,
}  # fmt: skip
NO_CAUSAL_MODELS: dict[str, tuple[Any, str]] = {
    "Qwen2ForSequenceClassification": (
        lambda: transformers.Qwen2Config(**TEXT, tie_word_embeddings=True),
        "its head would be lost",
    ),
    "LlamaForTokenClassification": (lambda: transformers.LlamaConfig(**TEXT), "its head would be lost"),
    "LlamaForQuestionAnswering": (lambda: transformers.LlamaConfig(**TEXT), "its head would be lost"),
    "BertForMaskedLM": (lambda: transformers.BertConfig(**BERT), "not a causal language model"),
    "BertLMHeadModel": (lambda: transformers.BertConfig(**BERT), "sees later tokens"),
    "RobertaModel": (lambda: transformers.RobertaConfig(**BERT), "sees later tokens"),
    "BartForConditionalGeneration": (lambda: transformers.BartConfig(**BART), "an encoder-decoder"),
    "Gemma3TextModel": (
        lambda: transformers.Gemma3TextConfig(**TEXT, head_dim=12, use_bidirectional_attention=True),
        "sees later tokens",
    ),
}


@pytest.mark.parametrize("kind", NO_CAUSAL_MODELS)
def test_what_is_no_causal_model_is_refused_by_its_architecture(kind: str, tmp_path: Path) -> None:
    make, words = NO_CAUSAL_MODELS[kind]
    said = refusal(saved(tmp_path / "source", kind, make()))
    assert kind in said
    assert words in said
    assert "decoder-only causal language models" in said.partition("hint: ")[2]
    assert "download" not in said


@pytest.mark.parametrize(
    "architectures", [None, [], 7, [7], ["LlamaModel"], ["LLaMAForCausalLM"], ["LlamaForCausalLM"]]
)
def test_a_causal_model_by_any_of_its_names_is_taken(architectures: Any, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", tie_word_embeddings=True)
    configure(source, architectures=architectures)
    quantize(source, tmp_path / "out")
    assert_is_quantized(source, tmp_path / "out")


def test_bert_as_a_decoder_is_taken(tmp_path: Path) -> None:
    config = transformers.BertConfig(**BERT, is_decoder=True)
    source = saved(tmp_path / "source", "BertLMHeadModel", config)
    quantize(source, tmp_path / "out")
    assert_is_quantized(source, tmp_path / "out")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "no such function"},
        {"hidden_size": 0},
        {"num_attention_heads": 0},
        {"vocab_size": 2**62},
        {"num_hidden_layers": 2**31},
        {"rope_parameters": {"rope_type": "no such type", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"rope_scaling": {"rope_type": "linear", "factor": "many"}},
        {"decoder": 7},
        {"decoder": {}, "text_config": {}},
    ],
    ids=str,
)
def test_a_config_that_describes_no_model_is_refused_quickly(changes: dict[str, Any], tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    configure(source, **changes)
    with pytest.raises(PreflightError) as caught:
        quantize(source, tmp_path / "out")
    assert all("config" in problem.message for problem in caught.value.problems[:1])
    assert all(isinstance(problem, BitstrataError) and problem.hint for problem in caught.value.problems)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "a.safetensors"])
def test_a_pipe_is_refused_instead_of_waited_for(name: str, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    if name == "a.safetensors":
        write_index(source, {"x": name})
    if name != "config.json":
        (source / "model.safetensors").unlink()
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    assert f"{name} is not a file but a pipe" in refusal(source)
