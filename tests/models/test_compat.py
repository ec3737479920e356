"""Every name of transformers and accelerate that we use though nobody promises it: there, and what we take it for."""

from __future__ import annotations

import ast
from pathlib import Path

import peft
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from safetensors.torch import load_file
from shrunk import shrunk
from torch import nn
from transformers import AttentionInterface, DynamicCache, StaticCache, cache_utils, initialization
from transformers.conversion_mapping import get_model_conversion_mapping

import bitstrata
from bitstrata.models import compat

SOURCE = Path(bitstrata.__file__).parent
# torch's own, and accesses within one of our packages: these files may use private names of what is not transformers'
OF_TORCH = {"_C", "_buffers", "_current_level", "_modules", "_parameters", "_set_fwd_grad_enabled", "_version",
            "_forward_hooks", "_forward_pre_hooks",
            "_apply", "_is_zerotensor", "_load_from_state_dict", "_opname", "_save_to_state_dict", "_exit"}  # fmt: skip
DOCUMENTED = {  # submodules of transformers that its documentation imports from
    "transformers.generation.streamers",
    "transformers.pytorch_utils",
    "transformers.quantizers.base",
    "transformers.quantizers.auto",
    "transformers.utils",
    "transformers.utils.quantization_config",
}
UNPROMISED = {"all_tied_weights_keys", "activate_past_recording", "cumulative_length", "record_past"}


def tiny(tied: bool = True, **overrides: object) -> transformers.LlamaForCausalLM:
    settings = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied}  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **overrides})).eval()


def tiny_mixtral() -> transformers.MixtralForCausalLM:
    config = transformers.MixtralConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def test_the_class_of_a_config_is_found():
    """Else no model loads: `causal_class` and `check_causal` ask it of every config."""
    assert compat.causal_classes()[transformers.LlamaConfig] is transformers.LlamaForCausalLM
    assert transformers.T5Config not in compat.causal_classes()


def test_the_attention_of_a_model_has_a_name_that_follows_a_change():
    """Else one-token attention stays slow on a CPU, and the engine cannot give a model its attention back."""
    model = tiny()
    assert compat.attention_of(model) == "sdpa"
    model.set_attn_implementation("eager")
    assert compat.attention_of(model) == "eager"


def test_a_model_with_an_attention_of_its_own_is_known():
    """Else the engine switches the attention of a model that does not ask for it, and its tokens are wrong."""
    assert compat.can_change_attention(tiny())
    bloom = transformers.BloomConfig(vocab_size=16, hidden_size=8, n_layer=1, n_head=2)
    assert not compat.can_change_attention(transformers.BloomForCausalLM(bloom))


def test_sdpa_under_another_name_gives_the_same_logits_where_padding_is_masked():
    """Else the attention that passes on to transformers' `sdpa` sees padding, or does not run at all."""
    AttentionInterface.register("compat_sdpa", lambda *args, **kwargs: compat.sdpa(*args, **kwargs))
    compat.register_mask_of_sdpa("compat_sdpa")
    model, ids = tiny(), torch.arange(6).view(2, 3)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("compat_sdpa")
        assert torch.equal(model(ids, attention_mask=mask).logits, expected)


def test_tied_parameters_are_listed_and_taken_off_the_list():
    """Else a tied head is quantized twice, or transformers ties a parameter that no longer exists."""
    model = tiny()
    assert compat.tied_parameters(model) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert compat.tied_parameters(tiny(tied=False)) == {}
    compat.untie(model, "lm_head.weight")
    assert compat.tied_parameters(model) == {}
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    model.tie_weights()
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_names_of_older_files_and_merged_experts_are_known():
    """Else older checkpoints lack tensors, or experts that transformers merges are taken for plain layers."""
    assert compat.name_changes(tiny())("model.norm.weight") == ("model.norm.weight", False)
    changed = compat.name_changes(tiny_mixtral())
    assert changed("model.layers.0.block_sparse_moe.experts.0.w1.weight")[1]
    assert not changed("model.layers.0.self_attn.q_proj.weight")[1]


def test_tensors_of_experts_are_known_by_what_transformers_does_to_them():
    """Else experts stored apart, or turned, are not found in the files, and planes are merged when they are loaded."""
    model = tiny_mixtral()
    changed = compat.expert_changes(model)
    name = "model.layers.0.mlp.experts"
    assert changed(f"{name}.1.w1.weight") == (f"{name}.gate_up_proj", 0, 2)
    assert changed(f"{name}.1.w3.weight") == (f"{name}.gate_up_proj", 1, 2)
    assert changed(f"{name}.1.w2.weight") == (f"{name}.down_proj", 0, 1)
    assert changed("model.layers.0.self_attn.q_proj.weight") is None
    conversions = get_model_conversion_mapping(model)
    kept = compat.only_renamings(conversions)
    assert 0 < len(kept) < len(conversions)


def test_the_activation_of_experts_is_known_where_it_is_their_own():
    """Else gpt-oss computes another function, or every model joins gate and up for nothing."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    small = {"hidden_size": 8, "intermediate_size": 8, "num_local_experts": 2}
    experts = GptOssExperts(transformers.GptOssConfig(**small))
    assert compat.own_gate(experts)(experts, torch.zeros(3, 16)).shape == (3, 8)
    mixtral = MixtralExperts(transformers.MixtralConfig(**small))
    assert compat.own_gate(mixtral) is None
    assert not compat.is_presorted(mixtral)
    assert compat.is_presorted(Llama4TextExperts(transformers.Llama4TextConfig(**small)))


def test_merged_experts_are_known_with_and_without_a_decorator():
    """Else planes take the place of what is no mixture of experts, or experts stay as they are."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

    small = {"hidden_size": 8, "intermediate_size": 8, "num_local_experts": 2}
    assert compat.is_merged(MixtralExperts(transformers.MixtralConfig(**small)))
    step = Step3p7Experts(transformers.Step3p7TextConfig(**small, moe_intermediate_size=8), swiglu_limit=1.0)
    assert compat.is_merged(step)
    assert torch.equal(compat.own_gate(step)(step, torch.full((1, 16), 9.0)), torch.ones(1, 8))
    assert not compat.is_merged(nn.Linear(2, 2))


def test_a_module_that_is_marked_gets_no_random_numbers():
    """Else a model whose code fills the experts that it expects fails on planes."""
    module = nn.Module()
    compat.mark_initialized(module)
    initialization.normal_(module, 0.0, 1.0)


def test_scaled_embeddings_are_known_by_name_and_number():
    """Else Gemma's embedding is refused, or its rows are not multiplied."""
    gemma = transformers.Gemma3TextConfig(vocab_size=16, hidden_size=4, intermediate_size=8, num_hidden_layers=1,
                                          num_attention_heads=2, num_key_value_heads=1, head_dim=2)  # fmt: skip
    embedding = transformers.Gemma3ForCausalLM(gemma).get_input_embeddings()
    assert compat.is_scaled_embedding(embedding)
    assert compat.embedding_scale(embedding) == (2.0, True)
    plain = nn.Embedding(4, 4)
    assert not compat.is_scaled_embedding(plain)
    assert compat.embedding_scale(plain) == (None, False)


def test_the_linears_taken_for_plain_ones_compute_what_a_plain_one_does():
    """Else Falcon's layers are left out, or multiplied by something else."""
    from transformers.models.falcon.modeling_falcon import FalconLinear

    layer, x = FalconLinear(4, 3), torch.randn(2, 4)
    assert compat.is_plain_linear(FalconLinear)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert not compat.is_plain_linear(nn.modules.linear.NonDynamicallyQuantizableLinear)


def test_control_tokens_are_read_where_a_tokenizer_lists_them():
    """Else words of the vocabulary are taken for control tokens."""
    from tiny_models import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    assert compat.text_control_tokens(tokenizer) is None
    tokenizer.chat_control_tokens = ["<tool>"]
    assert compat.text_control_tokens(tokenizer) == ["<tool>"]


def test_every_byte_has_a_character_in_byte_level_vocabularies():
    """Else streamed text breaks where a character's bytes come in several tokens."""
    characters = compat.byte_level_characters()
    assert sorted(characters.values()) == list(range(256))
    assert characters["Ġ"] == ord(" ")


def test_a_file_of_a_model_is_found_in_a_folder_and_missing_without_an_error(tmp_path, monkeypatch):
    """Else loading raises where a file is optional, or does not find the index of a model in the hub's cache."""
    (tmp_path / "index.json").write_text("{}")
    assert compat.stored_file(str(tmp_path), "index.json") == tmp_path / "index.json"
    assert compat.stored_file(str(tmp_path), "none.json") is None
    assert compat.stored_file(None, "index.json") is None
    monkeypatch.chdir(tmp_path)
    assert compat.stored_file("no-such-owner/no-such-model", "index.json") is None


def test_a_hook_is_off_inside_and_on_again_behind():
    """Else re-laying weights leaves accelerate with names of tensors that are gone."""

    class Adding(ModelHook):
        def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
            return output + 1

    layer, x = nn.Identity(), torch.zeros(1)
    add_hook_to_module(layer, Adding())
    with compat.unhooked(layer):
        assert float(layer(x)) == 0
        assert not compat.has_hooks(layer)
    assert float(layer(x)) == 1
    assert compat.has_hooks(layer)
    for register in (nn.Module.register_forward_hook, nn.Module.register_forward_pre_hook):
        other = nn.Identity()
        register(other, lambda *_: None)
        assert compat.has_hooks(other)


def test_a_static_cache_goes_back_to_a_length():
    """Else a captured decoding step runs past the end of its cache."""
    model, ids = tiny(), torch.arange(4).unsqueeze(0)
    cache = StaticCache(config=model.config, max_cache_len=8)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        first = model(ids[:, :1], past_key_values=cache).logits
        compat.set_cached_length(cache, 4)
        assert torch.equal(model(ids[:, :1], past_key_values=cache).logits, first)


def tiny_mistral() -> transformers.MistralForCausalLM:
    config = transformers.MistralConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                        num_attention_heads=2, num_key_value_heads=1, sliding_window=4)  # fmt: skip
    return transformers.MistralForCausalLM(config).eval()


def test_tokens_are_taken_back_from_a_sliding_window_while_it_records():
    """Else rejected drafts stay in the cache, or drafts fail on every model with a sliding window."""
    model, ids = tiny_mistral(), torch.arange(8).unsqueeze(0)
    cache = DynamicCache(config=model.config)
    assert compat.has_sliding_window(cache)
    assert not compat.has_sliding_window(DynamicCache(config=tiny().config))
    with torch.no_grad():
        model(ids, past_key_values=cache)
        compat.record_past(cache)
        expected = model(ids[:, :1], past_key_values=cache).logits
        cache.crop(-1)
        assert torch.allclose(model(ids[:, :1], past_key_values=cache).logits, expected)
        cache.crop(-1)
        compat.stop_recording(cache)
        assert torch.allclose(model(ids[:, :1], past_key_values=cache).logits, expected)
    with pytest.raises(RuntimeError):
        cache.crop(-1)


def test_layers_whose_tokens_cannot_be_taken_back_are_named():
    """Else drafts run on a cache that keeps what was rejected."""
    assert compat.uncuttable_layers(DynamicCache(config=tiny().config)) == []
    assert compat.uncuttable_layers(DynamicCache(config=tiny_mistral().config)) == []
    assert compat.uncuttable_layers(StaticCache(config=tiny().config, max_cache_len=8)) == ["StaticLayer"]


def foreign_names(source: str, own: set[str]) -> list[tuple[int, str]]:
    """(line, name) of everything in `source` that transformers does not promise; `own` are private names of ours."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            names = [str(getattr(node.args[1], "value", ""))]
        elif isinstance(node, ast.keyword):
            names = [node.arg or ""]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "Layer" in node.value:
            names = [node.value] if hasattr(cache_utils, node.value) else []
            found += [(node.lineno, name) for name in names]
            continue
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "transformers":
            if node.module != "transformers" and node.module not in DOCUMENTED:
                found.append((node.lineno, node.module))
            names = [alias.name for alias in node.names]
        found += [
            (node.lineno, name)
            for name in names
            if name in UNPROMISED or (name.startswith("_") and not name.startswith("__") and name not in own)
        ]
    return found


def own_names() -> set[str]:
    """Private names that our sources define: functions, classes, attributes and arguments."""
    names = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Subscript) and "__dict__" in ast.unparse(node.value):
                names.add(str(getattr(node.slice, "value", "")))
    return names


def test_nothing_unpromised_is_used_outside_of_the_one_file():
    own = (own_names() - {"_tied_weights_keys"}) | OF_TORCH
    problems = [
        f"{path.relative_to(SOURCE)}:{line} {name}"
        for path in sorted(SOURCE.rglob("*.py"))
        if path.name != "compat.py" and not (path.parent.name == "kernels" and path.name in ("ops.py", "plain.py"))
        for line, name in foreign_names(path.read_text(encoding="utf-8"), own)
    ]
    assert problems == []


@pytest.mark.parametrize(
    "planted",
    [
        "model.config._attn_implementation",
        "getattr(module, '_hf_hook', None)",
        "cached_file(name, file, _raise_exceptions_for_missing_entries=False)",
        "model.all_tied_weights_keys",
        "type(layer).__name__ == 'DynamicLayer'",
        "from transformers.core_model_loading import WeightRenaming",
        "from transformers import _Private",
    ],
)
def test_a_planted_name_is_caught(planted):
    assert foreign_names(planted, OF_TORCH)
    assert not foreign_names("self._own = model.config.vocab_size", {"_own"})


def test_a_config_of_a_model_that_sees_has_the_class_of_the_whole():
    """Else a wrapper's text part is made in its place, and its towers are lost."""
    assert compat.wrapper_classes()[transformers.Gemma3Config] is transformers.Gemma3ForConditionalGeneration
    assert transformers.LlamaConfig not in compat.wrapper_classes()


def test_a_model_is_made_of_a_class_in_fp32():
    """Else a source's skeleton has another dtype than what is read into it."""
    config = transformers.LlamaConfig(**tiny().config.to_dict() | {"dtype": torch.bfloat16})
    assert compat.new_model(transformers.LlamaForCausalLM, config).lm_head.weight.dtype == torch.float32


def test_a_class_says_which_tensors_it_does_without():
    """Else layers that predict further tokens are dropped as if they were nothing."""
    assert any("mtp" in pattern for pattern in compat.ignored_tensors(transformers.Qwen3NextForCausalLM))
    assert compat.ignored_tensors(transformers.LlamaForCausalLM) == []


def test_what_transformers_puts_together_is_done_as_it_does_it():
    """Else a convolution that is stored in three pieces is refused, or holds them in another order."""
    with torch.device("meta"):
        changed = compat.conversions_of(transformers.OlmoHybridForCausalLM(shrunk("olmo_hybrid")))
    base = "model.layers.0.linear_attn"
    name, index, conversion = changed(f"{base}.k_conv1d.weight")
    assert (name, index, conversion.count, conversion.by_rows) == (f"{base}.conv1d.weight", 1, 3, False)
    pieces = [torch.randn(2, 1, 4) for _ in range(3)]
    assert torch.equal(conversion(name, pieces)[name], torch.cat(pieces))
    assert changed(f"{base}.o_proj.weight") is None


def test_what_transformers_splits_is_done_as_it_does_it():
    """Else the parts of a fused matrix get each other's numbers, or need parameters that are long quantized."""
    with torch.device("meta"):
        changed = compat.conversions_of(transformers.HrmTextForCausalLM(shrunk("hrm_text")))
    name, index, conversion = changed("model.H_module.layers.0.mlp.gate_up_proj.weight")
    assert (index, conversion.count) == (0, 1)
    fused = torch.randn(24, 8)
    made = conversion(name, [fused])
    assert list(made) == [f"model.H_module.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up")]
    assert torch.equal(torch.cat(list(made.values())), fused)
    with pytest.raises(ValueError, match="shorter"):
        conversion(name, [])


@pytest.mark.parametrize("lacking", ["nothing", "Split"])
def test_rows_of_experts_that_are_stored_together_are_converted_alone(lacking, monkeypatch):
    """Else one expert is read by reading all of them; and where there is no Split yet, nothing is quantized."""
    monkeypatch.delattr(transformers.core_model_loading, lacking, raising=False)
    with torch.device("meta"):
        changed = compat.conversions_of(transformers.Inkling2ForCausalLM(shrunk("inkling2_text")))
    name, _, conversion = changed("model.layers.0.mlp.experts.w13_weight")
    assert name == "model.layers.0.mlp.experts.gate_up_proj"
    assert conversion.by_rows
    stored = torch.arange(2 * 6 * 3).view(2, 6, 3)
    whole = conversion(name, [stored])[name]
    assert torch.equal(whole[1], stored[1, [0, 2, 4, 1, 3, 5]])
    assert torch.equal(conversion(name, [stored[1:]])[name], whole[1:])


def test_a_model_is_saved_under_its_own_names(tmp_path: Path):
    """Else planes that were loaded and saved have names that the config of the checkpoint does not have."""
    model = tiny_mixtral()
    model.save_pretrained(tmp_path / "older")
    compat.save_own_names(model)
    model.save_pretrained(tmp_path / "own")
    names = [load_file(tmp_path / folder / "model.safetensors").keys() for folder in ("older", "own")]
    assert names[0] != names[1] == model.state_dict().keys()


def test_rotary_frequencies_are_those_that_models_use():
    """Else exported files have other positions."""
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    model = tiny(rope_parameters=rope, max_position_embeddings=512)
    assert torch.equal(compat.rotary_frequencies(model.config, "llama3"), model.model.rotary_emb.inv_freq)
    assert not torch.equal(model.model.rotary_emb.inv_freq, tiny().model.rotary_emb.inv_freq)


def test_peft_puts_our_layers_beside_ours():
    """Else adapters cannot be trained on planes."""

    class Mine(nn.Module):
        def __init__(self, layer, *_, **__):
            super().__init__()
            self.base_layer = layer

    config = peft.LoraConfig(target_modules=["q_proj"])
    compat.adapt_layers(config, {nn.Linear: Mine})
    model = tiny()
    peft.inject_adapter_in_model(config, model)
    assert isinstance(model.model.layers[0].self_attn.q_proj, Mine)
