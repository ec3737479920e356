"""The way into transformers: a quantization config, a quantizer, and models that take `bits`.

Importing this module registers quant_method "bitstrata", after which plain
`AutoModelForCausalLM.from_pretrained(OUT)` builds layers that run from planes and loads planes into them.
A loaded model's class is a subclass, with the same name, which takes `bits=` where it is called, in `forward` and in
`generate`; the outermost call sets the shared BitsState and restores it on the way out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig, PreTrainedModel, StoppingCriteriaList, StopStringCriteria
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from ..checkpoint import QUANT_METHOD, CheckpointReader, QuantizationSpec
from ..checkpoint.schema import INDEX_FILE
from ..errors import CheckpointError, UsageError
from ..nn import (
    Bits,
    BitsState,
    Experts,
    PlaneEmbedding,
    PlaneLinear,
    PlaneModule,
    StoredExperts,
    bits_state,
    fuse,
)
from .adapters import lora_on_planes, read_config
from .attention import use_grouped_sdpa
from .compat import only_renamings, save_own_names, stored_file, unhooked
from .dequantize import dequantize_in_place
from .discover import linear_of, local_name, set_submodule, submodule
from .experts import check_whole, put_stored_experts
from .head import check_untied, put_embedding
from .hf_config import BitstrataConfig
from .on_the_fly import quantize_in_place
from .speculation import Speculation, speculate


class PageSource(Protocol):
    """Where a model that holds one plan's pages gets those of another (plans/resize.py)."""

    def resize(self, model: Any, size: Any) -> Any: ...


@register_quantizer(QUANT_METHOD)
class BitstrataQuantizer(HfQuantizer):
    """Puts planes in the place of quantized layers before transformers loads the weights."""

    quantization_config: BitstrataConfig

    def update_tp_plan(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Called before the dtype is settled by transformers that does not call `update_attn_implementation`."""
        return self.update_attn_implementation(config)

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Called before the dtype is settled: say it where the checkpoint's config does not.

        transformers would take that of the first floating tensor, which is one of our scales.
        """
        if (
            self.pre_quantized
            and config.dtype is None
            and (index := stored_file(config.name_or_path, INDEX_FILE)) is not None
        ):
            config.dtype = CheckpointReader(index.parent).dtype
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if self.quantization_config.recipe is not None:
            return model
        if checkpoint_files:
            reader = CheckpointReader(Path(checkpoint_files[0]).parent)  # names whatever is missing or malformed
            reader.note_changes()
        self._held = replace_layers(model, self.quantization_config.spec, paged=self.quantization_config.paged)
        self._shapes = _shapes(model)
        take_bits(model)  # now: hooks that are put in while weights load have to find `forward` as it will be
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        recipe = self.quantization_config.recipe
        if recipe is not None:
            spec = quantize_in_place(model, recipe)
            self.quantization_config = BitstrataConfig(**spec.model_dump(exclude_none=True))
            model.config.quantization_config = self.quantization_config
            return attach(model)
        for name, found in _shapes(model).items():  # some versions of transformers do not compare them for a quantizer
            if found != (wanted := self._shapes.get(name, found)):
                raise CheckpointError(
                    f"{name} is {list(found)} in the files, {list(wanted)} in the model",
                    hint="config.json and the weights are of different models; copy or download them again",
                )
        model.config.quantization_config = BitstrataConfig(**self._held.model_dump(exclude_none=True))
        save_own_names(model)  # those that the config calls its layers by
        return attach(model)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return leave_bits(dequantize_in_place(model, dtype))

    def update_weight_conversions(self, weight_conversions: list[Any], *rest: Any) -> list[Any]:
        """A checkpoint has the model's own names and shapes: experts in planes are not merged, nor turned."""
        return only_renamings(weight_conversions) if self.pre_quantized else weight_conversions

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside planes are, planes are not."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def replace_layers(model: PreTrainedModel, spec: QuantizationSpec, *, paged: bool = False) -> QuantizationSpec:
    """Put planes in the place of every layer that `spec` names; those without a role share one BitsState.

    A model without an output head, such as a classifier, leaves the head's planes out.

    Args:
        paged: those start without pages (plans/resize.py).

    Returns:
        `spec` as the model holds it: without what it left out, and with its own names.

    Raises CheckpointError if a layer is not in the model or has another size there.
    """
    layers = {name: () if paged else spec.layer_bits(name) for name in spec.planned_layers}
    fixed = {name: max(spec.layer_bits(name)) for name in spec.whole_layers}
    state = BitsState(layers, fixed=fixed, plan={} if paged else None)
    has_head = model.get_output_embeddings() is not None
    held = {}
    for known, stored in spec.layers.items():
        if stored.role == "head" and not has_head:
            continue
        name, layer = local_name(model, known), stored
        if stored.experts is not None:
            shape = {"group_size": spec.layer_group_size(known), "kind": stored.decoder, "bits": spec.layer_bits(known)}
            held[name] = stored
            put_stored_experts(model, name, known, stored, state, paged, shape)
            continue
        if stored.tied is not None and not has_head:
            layer = stored.model_copy(update={"tied": None})
        held[name] = layer
        place = linear_of(model, name, layer) if layer.role != "embedding" else submodule(model, name)
        weight = place.weight
        shared: dict[str, Any] = {
            "group_size": spec.layer_group_size(known),
            "kind": layer.decoder,
            "device": weight.device,
            "dtype": weight.dtype,
        }
        if layer.role == "embedding":
            put_embedding(model, name, layer, shared, state)
            continue
        if layer.role == "head":
            check_untied(model, name)
        linear = PlaneLinear(
            layer.in_features,
            layer.out_features,
            name=known,
            state=state,
            bits=spec.layer_bits(known),
            bias=layer.bias,
            paged=paged and layer.role is None,
            **shared,
        )
        set_submodule(model, name, linear)
    check_whole(model)
    return spec.model_copy(update={"layers": held})


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Let `model` take `bits` and give its layers the kernels' layout; the same object."""
    for module in list(model.modules()):
        if isinstance(module, Experts):
            module.open()
    take_bits(model)
    for module in model.modules():
        if isinstance(module, PlaneModule):
            with unhooked(module):
                module.pack()
    fuse(model)
    use_grouped_sdpa(model)
    return model


def take_bits(model: PreTrainedModel) -> None:
    """Give `model`, and every transformers model inside it that holds quantized layers, a `bits` argument."""
    state = bits_state(model)  # raises if nothing is quantized
    inside = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for module in inside:
        if "bits_state" not in module.__dict__ and any(map(_has_planes, module.modules())):
            module.bits_state = state  # type: ignore[assignment]
            module.__class__ = _class_with_bits(type(module))  # type: ignore[arg-type]


def leave_bits(model: PreTrainedModel) -> PreTrainedModel:
    """Take the `bits` argument away again, from a model that holds no planes any more; the same object."""
    for module in model.modules():
        if isinstance(module, TakesBits):
            module.__class__ = module._architecture
            for name in ("bits_state", "pages", "speculation"):
                module.__dict__.pop(name, None)
    return model


def _has_planes(module: Any) -> bool:
    return isinstance(module, (PlaneModule, StoredExperts))


class TakesBits:
    """What the class of a loaded model adds to the architecture's: `bits` where it is called, and `resize`.

    `__call__` sets bits before any hook or wrapper around `forward` runs, and does not pass them on: a wrapper may drop
    or copy keywords that it does not know. `forward` is for those who call it themselves.
    """

    _architecture: type
    bits_state: BitsState
    pages: PageSource | None = None
    speculation: Speculation | None = None

    @property
    def bits(self) -> Any:
        """At what the model runs where a call does not say: an int or a plan. Setting it switches; None is the default.

        Raises as setting `BitsState.value`.
        """
        return self.bits_state.value

    @bits.setter
    def bits(self, value: Bits | None) -> None:
        self.bits_state.value = value

    def __call__(self, *args: Any, bits: Bits | None = None, **kwargs: Any) -> Any:
        if bits is None:  # as they are set, which is for `forward` to see to
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with _step(self, bits, args, kwargs):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, bits: Bits | None = None, **kwargs: Any) -> Any:
        with _step(self, bits, args, kwargs):
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def resize(self, size: Any) -> Any:
        """Hold another plan's pages: see `bitstrata.resize`. Raises UsageError for a model that holds all planes."""
        if self.pages is None:
            raise UsageError(
                f"this {type(self).__name__} holds all of its planes and cannot be resized",
                hint="load it with bitstrata.load(OUT, plan=...) or budget=...",
            )
        return self.pages.resize(self, size)

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        config = lora_on_planes(self, adapter_config)  # type: ignore[arg-type]
        super().add_adapter(config, adapter_name)  # type: ignore[misc]

    def load_adapter(
        self, peft_model_id: str | None = None, adapter_name: str | None = None, peft_config: Any = None, **kwargs: Any
    ) -> Any:
        if peft_config is None and peft_model_id is not None:
            peft_config = read_config(peft_model_id, kwargs)
        config = lora_on_planes(self, peft_config)  # type: ignore[arg-type]
        return super().load_adapter(peft_model_id, adapter_name, peft_config=config, **kwargs)  # type: ignore[misc]

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        if (args or kwargs) and isinstance(self.get_input_embeddings(), PlaneEmbedding):  # type: ignore[attr-defined]
            raise UsageError(
                f"the vocabulary of this {type(self).__name__} cannot be resized: its embedding is stored as planes",
                hint="resize the original model and quantize that, or quantize without --head-bits",
            )
        return super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        if self.bits_state.plan is not None:
            raise UsageError(
                f"this {type(self).__name__} holds only the pages of its plan, which is no checkpoint",
                hint=f"copy {self.name_or_path}, or load it without a plan or budget and save that",  # type: ignore[attr-defined]
            )
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made here, so pickle and copy cannot look it up by name
        return _blank, (self._architecture,), self.__dict__


class TakesDraftBits(TakesBits):
    """That of a model that generates text; classifiers and plain encoders do not."""

    def generate(
        self, *args: Any, bits: Bits | None = None, draft_bits: int | None = None, draft_tokens: int = 4, **kwargs: Any
    ) -> Any:
        if draft_bits is not None:
            speculation = Speculation(draft_bits, draft_tokens, streamer=kwargs.get("streamer"))
            kwargs = self._with_draft(bits, speculation, kwargs)
        with nullcontext() if bits is None else self.bits_state.using(bits):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _with_draft(self, bits: Bits | None, speculation: Speculation, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments for transformers' generate; what comes of the draft will be in `speculation`."""
        state = self.bits_state
        checked = state.value if bits is None else state.resolve(bits).given
        speculation.check(state, checked)
        self.speculation = speculation
        kwargs = {**kwargs, "custom_generate": speculate, "speculation": speculation}
        strings, tokenizer = kwargs.pop("stop_strings", None), kwargs.pop("tokenizer", None)
        if strings is not None:  # transformers takes the tokenizer away from decoding methods that are not its own
            if tokenizer is None:
                raise UsageError("stop_strings need the tokenizer", hint="pass tokenizer= to generate")
            criteria = kwargs.get("stopping_criteria") or StoppingCriteriaList()
            kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer, strings)])
        return kwargs


@cache
def _class_with_bits(base: Any) -> Any:
    """A subclass of `base` under the same name that takes bits."""
    mixin = TakesDraftBits if hasattr(base, "generate") else TakesBits
    members: dict[str, Any] = {key: getattr(base, key) for key in ("__module__", "__qualname__", "__doc__")}
    members["_architecture"] = base
    for name in ("forward", "generate", "resize_token_embeddings", "save_pretrained", "add_adapter", "load_adapter"):
        if hasattr(mixin, name):
            members[name] = _described(getattr(mixin, name), getattr(base, name))
    return type(base.__name__, (mixin, base), members)


def _described(method: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """`method` with the name, the docstring and the signature of `original`, and the arguments that it adds."""

    @wraps(original)
    def described(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    signature = inspect.signature(original)
    added = inspect.signature(method).parameters.values()
    parameters = list(signature.parameters.values())
    at = len(parameters) - (bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    parameters[at:at] = [item for item in added if item.kind is inspect.Parameter.KEYWORD_ONLY]
    described.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return described


def _blank(base: Any) -> Any:
    made = _class_with_bits(base)
    return made.__new__(made)


def _step(model: Any, bits: Bits | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[None]:
    """One forward pass of `model` on these arguments at `bits`, or at what is set; nothing changes them meanwhile."""
    if bits is not None and model.training and torch.is_grad_enabled():
        _check_checkpointing(model, bits)
    tokens = kwargs.get("input_ids", args[0] if args else None)
    step: AbstractContextManager[None] = model.bits_state.step(
        bits, tokens if tokens is not None else kwargs.get("inputs_embeds")
    )
    return step


def _check_checkpointing(model: Any, bits: Bits) -> None:
    """Raise UsageError if blocks that are run again in the backward pass would then run at other bits than `bits`."""
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return
    state = model.bits_state
    if not state.resolve(bits).agrees(state.resolve(state.value)):
        raise UsageError(
            "with gradient checkpointing, blocks run again in the backward pass, after the bits of this call",
            hint="put the call and backward() inside `with bitstrata.use_bits(model, bits):`",
        )
