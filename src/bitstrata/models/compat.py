"""What transformers and accelerate do not promise to keep: private names, and names of classes and attributes.

Everything of this kind is used through this file (a test reads the sources), so an upgrade breaks here and nowhere
else. tests/models/test_compat.py has a test for each function, which says what a change would break. Checked with
transformers 5.17 to 5.23.
"""

from __future__ import annotations

import copy
import inspect
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils.hub import cached_file

# subclasses of nn.Linear that compute what it computes; others multiply by something else, or return more
PLAIN_LINEARS = ("transformers.models.falcon.modeling_falcon.FalconLinear",)
# experts that are called with the inputs of each; they have no decorator that says how they are merged
PRESORTED = ("transformers.models.llama4.modeling_llama4.Llama4TextExperts",)
# experts that are merged in the usual way but have no such decorator either
UNDECORATED = ("transformers.models.step3p7.modeling_step3p7.Step3p7Experts",)
DEFAULT_GATE = "_default_apply_gate"  # what transformers gives experts without an activation of their own
SCALED_EMBEDDING = "ScaledWordEmbedding"  # the end of the names of embeddings that multiply their rows by a number


def causal_classes() -> Mapping[Any, Any]:
    """Class of a config -> what AutoModelForCausalLM makes of it. Listing the keys imports every architecture."""
    mapping: Mapping[Any, Any] = AutoModelForCausalLM._model_mapping
    return mapping


def wrapper_classes() -> Mapping[Any, Any]:
    """Class of a config -> the model that also sees or hears which transformers makes of it."""
    images, more = AutoModelForImageTextToText._model_mapping, AutoModelForMultimodalLM._model_mapping
    return ChainMap(images, more)


def new_model(kind: Any, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of class `kind` in fp32, as `from_config` of transformers' auto classes makes it."""
    model: PreTrainedModel = kind._from_config(config, dtype=torch.float32)
    return model


def ignored_tensors(kind: Any) -> list[str]:
    """Patterns of stored names that models of class `kind` do without, such as those of layers for drafting."""
    found = getattr(kind, "_keys_to_ignore_on_load_unexpected", None)
    return list(found or ())


def attention_of(model: PreTrainedModel) -> str | None:
    """The name of the attention that `model` runs."""
    name: str | None = model.config._attn_implementation
    return name


def can_change_attention(model: PreTrainedModel) -> bool:
    """Whether `model.set_attn_implementation` works: its attention asks transformers for a function by name."""
    return bool(model._can_set_attn_implementation())


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The part of `model` between the embedding and the output head, both ends of its own included."""
    decoder: nn.Module = model.get_decoder()
    return decoder


def rotary_types(rotary: nn.Module) -> bool:
    """Whether a rotary embedding has to be told for which kind of layer the angles are."""
    return "layer_type" in inspect.signature(rotary.forward).parameters


def register_mask_of_sdpa(name: str) -> None:
    """Give the attention `name` the masks of transformers' `sdpa`."""
    AttentionMaskInterface.register(name, sdpa_mask)


def sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    """transformers' own `sdpa`: (output [B, L, H, D], None)."""
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def tied_parameters(model: PreTrainedModel) -> dict[str, str]:
    """Parameter -> the parameter whose tensor it is, for all that the config ties."""
    return dict(model.all_tied_weights_keys)


def untie(model: PreTrainedModel, parameter: str) -> None:
    """Take `parameter` off the lists of tied weights: it no longer exists."""
    model.all_tied_weights_keys = {key: value for key, value in tied_parameters(model).items() if key != parameter}
    listed = model._tied_weights_keys
    if isinstance(listed, dict):
        model._tied_weights_keys = {key: value for key, value in listed.items() if key != parameter}


def tie(model: PreTrainedModel, parameter: str, source: str) -> None:
    """Put `parameter` on the lists of tied weights: it is the one called `source`."""
    model.all_tied_weights_keys = {**tied_parameters(model), parameter: source}
    if isinstance(model._tied_weights_keys, dict):
        model._tied_weights_keys = {**model._tied_weights_keys, parameter: source}


def name_changes(model: PreTrainedModel) -> Callable[[str], tuple[str, bool]]:
    """What becomes of a stored name in `model`: the new name, and whether transformers merges or splits the tensor."""
    renamings, converters = _conversions(model)

    def changed(name: str) -> tuple[str, bool]:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name, any(converter.rename_source_key(name)[1] is not None for converter in converters)

    return changed


def expert_changes(model: PreTrainedModel) -> Callable[[str], tuple[str, int, int] | None]:
    """Which parameter of all experts transformers puts a stored tensor of one expert into, or one of all experts.

    Called with a name that `name_changes` has renamed: (the parameter, which of its pieces the tensor is, of how many),
    0 pieces for a tensor that is turned at most; None for what is no expert's.
    """
    _, converters = _conversions(model)

    def changed(name: str) -> tuple[str, int, int] | None:
        for converter in converters:
            merged, pattern = converter.rename_source_key(name)
            if pattern is None:
                continue
            kinds = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
            pieces = len(converter.source_patterns)
            if kinds == [("MergeModulelist", 0)] and pieces == 1:
                return merged, 0, 1
            if kinds == [("MergeModulelist", 0), ("Concatenate", 1)] and pieces == 2:
                return merged, converter.source_patterns.index(pattern), 2
            if [kind for kind, _ in kinds] == ["Transpose"] and pieces == 1:
                return merged, 0, 0
            return None
        return None

    return changed


def _conversions(model: PreTrainedModel) -> tuple[list[Any], list[Any]]:
    """What transformers renames when it loads `model`, and what it merges, splits or turns."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    return renamings, [transform for transform in transforms if isinstance(transform, WeightConverter)]


def only_renamings(conversions: list[Any]) -> list[Any]:
    """Of what transformers does to tensors when it loads a model, what gives them other names."""
    from transformers.core_model_loading import WeightConverter

    return [conversion for conversion in conversions if not isinstance(conversion, WeightConverter)]


def save_own_names(model: PreTrainedModel) -> None:
    """Let `model.save_pretrained` keep the names of its state dict, not turn them into those of older files."""
    model._weight_conversions = []  # type: ignore[assignment]


def mark_initialized(module: nn.Module) -> None:
    """Keep transformers from giving `module` random numbers where it holds no parameters under the names it expects."""
    module._is_hf_initialized = True  # type: ignore[assignment]


def own_gate(experts: nn.Module) -> Callable[[nn.Module, Tensor], Tensor] | None:
    """What experts make of gate and up, called with them and [n, 2I]; None where that is act_fn(gate) * up."""
    gate: Any = getattr(type(experts), "_apply_gate", None)
    return None if gate is None or gate.__name__ == DEFAULT_GATE else gate


def is_presorted(experts: nn.Module) -> bool:
    """Whether experts are called with the inputs of each, one after the other, instead of with the router's choice."""
    return f"{type(experts).__module__}.{type(experts).__qualname__}" in PRESORTED


def is_merged(experts: nn.Module) -> bool:
    """Whether experts are known to be merged; `is_transposed` and others say how, where it is not the usual way."""
    return (
        hasattr(experts, "is_transposed") or f"{type(experts).__module__}.{type(experts).__qualname__}" in UNDECORATED
    )


@dataclass(frozen=True)
class Conversion:
    """What transformers makes of the stored tensors of one converter when it loads a model.

    count: how many tensors it takes. by_rows: whether rows of what it makes need the same rows only of what it takes.
    """

    count: int
    by_rows: bool
    _converter: Any
    _model: Any

    def __call__(self, first: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The tensors of the model, by name, of `tensors`, in order; `first` is the name of the first one made."""
        converter = copy.deepcopy(self._converter)  # it keeps what it is given
        for pattern, tensor in zip(converter.source_patterns, tensors, strict=True):
            converter.add_tensor(first, first, pattern, tensor)
        made: dict[str, Any] = converter.convert(first, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def conversions_of(model: PreTrainedModel) -> Callable[[str], tuple[str, int, Conversion] | None]:
    """What transformers does with a stored tensor that it merges, splits or turns when it loads `model`.

    Called with a name that `name_changes` has renamed: (the name of the first tensor that is made, which of those
    taken this one is, the conversion); None for what only gets another name.
    """
    from transformers import core_model_loading as loading

    # transformers 5.17 has no Split yet
    kinds = {getattr(loading, name, None) for name in ("Chunk", "Concatenate", "Interleave", "Split")}
    sizes = dict(model.named_parameters())  # of now: what is quantized later no longer has its parameters
    stand_in = SimpleNamespace(config=model.config, get_parameter=sizes.__getitem__)

    def conversion(converter: Any) -> Conversion:
        by_rows = all(type(op) in kinds and op.dim > 0 for op in converter.operations)
        return Conversion(len(converter.source_patterns), by_rows, converter, stand_in)

    found = [(converter, conversion(converter)) for converter in _conversions(model)[1]]

    def changed(name: str) -> tuple[str, int, Conversion] | None:
        for converter, made in found:
            first, pattern = converter.rename_source_key(name)
            if pattern is not None:
                return first, converter.source_patterns.index(pattern), made
        return None

    return changed


def embedding_scale(module: nn.Module) -> tuple[float | None, bool]:
    """The number by which an embedding multiplies its rows, None if it does not, and whether it is rounded first.

    It is rounded to the dtype of the rows where transformers holds it in a buffer, which may be on meta.
    """
    held = getattr(module, "embed_scale", None)
    number = getattr(module, "scalar_embed_scale", held)
    return (float(number) if isinstance(number, (int, float)) else None), isinstance(held, torch.Tensor)


def is_scaled_embedding(module: nn.Module) -> bool:
    """Whether `module` is an embedding that does no more than multiply its rows by a number."""
    return type(module).__name__.endswith(SCALED_EMBEDDING) and embedding_scale(module)[0] is not None


def is_plain_linear(kind: type[nn.Linear]) -> bool:
    """Whether modules of `kind` compute what nn.Linear computes."""
    return kind is nn.Linear or f"{kind.__module__}.{kind.__qualname__}" in PLAIN_LINEARS


def text_control_tokens(tokenizer: Any) -> list[str] | None:
    """The control tokens that a tokenizer itself lists; None before transformers 5.23, and where it lists none."""
    listed: list[str] | None = getattr(tokenizer, "chat_control_tokens", None)
    return listed


def byte_level_characters() -> dict[str, int]:
    """Character -> byte, in the vocabularies of byte-level tokenizers."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


def stored_file(name: str | None, file: str) -> Path | None:
    """`file` of a model that is a folder or was fetched from the hub; None if it is not there."""
    if not name:
        return None
    missing = {"_raise_exceptions_for_missing_entries": False}
    path = Path(name, file) if Path(name).is_dir() else cached_file(name, file, **missing)
    return Path(path) if path is not None and Path(path).is_file() else None


def has_hooks(module: nn.Module) -> bool:
    """Whether something is hooked into the calls of `module` itself."""
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))


@contextmanager
def unhooked(module: nn.Module) -> Iterator[None]:
    """Without the hook that accelerate has put around `module`, if there is one: it remembers tensors by name."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(module)
    try:
        yield
    finally:
        add_hook_to_module(module, hook)


def generation_inputs(model: Any, ids: Tensor) -> dict[str, Any]:
    """What transformers' generate prepares before its first step on `ids` int64 [1, n], an empty cache among it."""
    found: list[dict[str, Any]] = []

    def look(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        found.append(kwargs)
        return input_ids

    settings: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}
    if getattr(model.generation_config, "cache_implementation", None) is not None:
        settings["cache_implementation"] = "dynamic"  # others have a length from the start
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, use_cache=True, custom_generate=look, **settings
    )
    of_the_loop = {"logits_processor", "stopping_criteria", "generation_config", "streamer", "synced_gpus"}
    return {name: value for name, value in found[0].items() if name not in of_the_loop}


def generation_step(
    model: Any, ids: Tensor, inputs: dict[str, Any], outputs: Any, count: int, **extra: Any
) -> tuple[Any, dict[str, Any]]:
    """One step of transformers' generate: the last `count` of `ids` [1, n] go through `model`, the others did before.

    Args:
        inputs: of `generation_inputs`, or what the step before returned.
        outputs: of the step before; None before the first.

    Returns:
        The model's output and the inputs of the next step.
    """
    if outputs is None:
        prepared = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **inputs)
    else:
        inputs = model._update_model_kwargs_for_generation(outputs, inputs, num_new_tokens=count)
        prepared = model.prepare_inputs_for_generation(ids, next_sequence_length=count, **inputs)
    return model(**prepared, return_dict=True, **extra), inputs


def cache_bytes(inputs: Mapping[str, Any]) -> int:
    """Bytes of the cache that is among the inputs of `generation_step`."""
    caches = [value for name, value in inputs.items() if name in ("past_key_values", "cache_params")]
    held = [value for cache in caches for layer in getattr(cache, "layers", ()) for value in vars(layer).values()]
    held += [value for item in held if isinstance(item, dict) for value in item.values()]
    return sum(value.nbytes for value in held if isinstance(value, Tensor))


def set_cached_length(cache: Cache, length: int) -> None:
    """Let a static cache hold its first `length` tokens, on the device, so that the host does not wait."""
    for layer in cache.layers:
        assert isinstance(layer, StaticLayer)
        layer.cumulative_length.fill_(length)


def has_sliding_window(cache: Cache) -> bool:
    """Whether some layers of `cache` let go of what leaves their window."""
    return any(type(layer) is DynamicSlidingWindowLayer for layer in cache.layers)


def uncuttable_layers(cache: Cache) -> list[str]:
    """The kinds of layers of `cache` whose last tokens cannot be taken back."""
    kinds = {type(layer) for layer in getattr(cache, "layers", ())}
    return sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer})


def record_past(cache: Cache) -> None:
    """From now on keep what leaves a sliding window, so that `cache.crop` can take tokens back."""
    if has_sliding_window(cache):
        cache.activate_past_recording()


def stop_recording(cache: Cache) -> None:
    """The opposite of `record_past`."""
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.record_past = False


def rotary_frequencies(config: PreTrainedConfig, kind: str) -> Tensor:
    """The inverse frequencies of rotary positions of `kind` ("yarn", "llama3"), fp32 [rotary / 2]."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies: Tensor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0]
    return frequencies


def adapt_layers(config: Any, layers: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Tell PEFT by what layers of its own to replace others, in its LoraConfig `config`."""
    config._register_custom_module(dict(layers))
