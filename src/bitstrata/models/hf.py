"""The way into transformers: a quantization config, a quantizer, and models that take `bits`.

Importing this module registers quant_method "bitstrata", after which plain
`AutoModelForCausalLM.from_pretrained(OUT)` builds layers that run from planes and loads planes into them.
A loaded model's class is a subclass, with the same name, which takes `bits=` where it is called, in `forward` and in
`generate`; the outermost call sets the shared BitsState and restores it on the way out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, StoppingCriteriaList, StopStringCriteria
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint import QUANT_METHOD, CheckpointReader, QuantizationSpec
from ..checkpoint.schema import INDEX_FILE
from ..errors import CheckpointError, UsageError
from ..nn import (
    Bits,
    BitsState,
    FixedBits,
    PlaneEmbedding,
    PlaneLinear,
    PlaneModule,
    ResidentState,
    RowBits,
    bits_state,
    fuse,
)
from ..progress import Reporter
from .attention import use_grouped_sdpa
from .compat import stored_file, unhooked
from .discover import linear_of, local_name, set_submodule, submodule
from .head import check_untied, put_embedding
from .resize import Resized, Size, resize
from .speculation import Speculation, speculate


@register_quantization_config(QUANT_METHOD)
class BitstrataConfig(QuantizationConfigMixin):
    """`quantization_config` of a bitstrata checkpoint as transformers wants it; fields as in FORMAT.md.

    Raises CheckpointError naming the field that is wrong.
    """

    def __init__(self, *, paged: bool = False, **fields: Any) -> None:
        """`paged` is never in a file: `load` asks with it for layers that start without pages."""
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.paged = paged
        self.spec = QuantizationSpec.parse({"quant_method": QUANT_METHOD, **fields}, "the model's config.json")

    def to_dict(self) -> dict[str, Any]:
        return self.spec.model_dump(exclude_none=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> BitstrataConfig:
        return self  # the spec is frozen


@register_quantizer(QUANT_METHOD)
class BitstrataQuantizer(HfQuantizer):
    """Puts planes in the place of quantized layers before transformers loads the weights."""

    requires_calibration = True
    quantization_config: BitstrataConfig

    def update_tp_plan(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Called before the dtype is settled by transformers that does not call `update_attn_implementation`."""
        return self.update_attn_implementation(config)

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Called before the dtype is settled: say it where the checkpoint's config does not.

        transformers would take that of the first floating tensor, which is one of our scales.
        """
        if config.dtype is None and (index := stored_file(config.name_or_path, INDEX_FILE)) is not None:
            config.dtype = CheckpointReader(index.parent).dtype
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if checkpoint_files:
            reader = CheckpointReader(Path(checkpoint_files[0]).parent)  # names whatever is missing or malformed
            reader.note_changes(Reporter())
        self._held = replace_layers(model, self.quantization_config.spec, paged=self.quantization_config.paged)
        self._shapes = _shapes(model)
        take_bits(model)  # now: hooks that are put in while weights load have to find `forward` as it will be
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, found in _shapes(model).items():  # some versions of transformers do not compare them for a quantizer
            if found != (wanted := self._shapes.get(name, found)):
                raise CheckpointError(
                    f"{name} is {list(found)} in the files, {list(wanted)} in the model",
                    hint="config.json and the weights are of different models; copy or download them again",
                )
        model.config.quantization_config = BitstrataConfig(**self._held.model_dump(exclude_none=True))
        return attach(model)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def replace_layers(model: PreTrainedModel, spec: QuantizationSpec, *, paged: bool = False) -> QuantizationSpec:
    """Put planes in the place of every layer that `spec` names; those without a role share one BitsState.

    A model without an output head, such as a classifier, leaves the head's planes out.

    Args:
        paged: those start without pages (models/resize.py).

    Returns:
        `spec` as the model holds it: without what it left out, and with its own names.

    Raises CheckpointError if a layer is not in the model or has another size there.
    """
    layers = {name: spec.layer_bits(name) for name in spec.planned_layers}
    state = ResidentState(layers) if paged else BitsState(tuple(spec.bits), layers)
    has_head = model.get_output_embeddings() is not None
    held = {}
    for known, stored in spec.layers.items():
        if stored.role == "head" and not has_head:
            continue
        name, layer = local_name(model, known), stored
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
        bits = spec.layer_bits(known)
        linear = PlaneLinear(
            layer.in_features,
            layer.out_features,
            name=known,
            state=state if layer.role is None else FixedBits(bits[0], state),
            bits=bits,
            bias=layer.bias,
            paged=paged and layer.role is None,
            **shared,
        )
        set_submodule(model, name, linear)
    return spec.model_copy(update={"layers": held})


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Let `model` take `bits` and give its layers the kernels' layout; the same object."""
    take_bits(model)
    for module in model.modules():
        if isinstance(module, PlaneModule):
            with unhooked(module):
                module.prepare()
    fuse(model)
    use_grouped_sdpa(model)
    return model


def take_bits(model: PreTrainedModel) -> None:
    """Give `model`, and every transformers model inside it that holds quantized layers, a `bits` argument."""
    state = bits_state(model)  # raises if nothing is quantized
    inside = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for module in inside:
        if "bits_state" not in module.__dict__ and any(isinstance(child, PlaneModule) for child in module.modules()):
            module.bits_state = state  # type: ignore[assignment]
            module.__class__ = _class_with_bits(type(module))  # type: ignore[arg-type]


@cache
def _class_with_bits(base: Any) -> Any:
    """A subclass of `base` under the same name that takes `bits` where it is called.

    `__call__` has them set before any hook or wrapper that somebody puts around `forward` runs, and does not pass
    them on: such a wrapper may drop or copy what it does not know. `forward` is for those who call it themselves.
    """

    def call(self: Any, *args: Any, bits: Bits | None = None, **kwargs: Any) -> Any:
        if bits is None:  # as they are set, which is for `forward` to see to
            return base.__call__(self, *args, **kwargs)
        with _running(self, bits, args, kwargs):
            return base.__call__(self, *args, **kwargs)

    @wraps(base.forward)
    def forward(self: Any, *args: Any, bits: Bits | None = None, **kwargs: Any) -> Any:
        with _running(self, bits, args, kwargs):
            return base.forward(self, *args, **kwargs)

    @wraps(base.resize_token_embeddings)
    def resize_token_embeddings(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (args or kwargs) and isinstance(self.get_input_embeddings(), PlaneEmbedding):
            raise UsageError(
                f"the vocabulary of this {base.__name__} cannot be resized: its embedding is stored as planes",
                hint="resize the original model and quantize that, or quantize without --head-bits",
            )
        return base.resize_token_embeddings(self, *args, **kwargs)

    @wraps(base.save_pretrained)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.bits_state, ResidentState):
            raise UsageError(
                f"this {base.__name__} holds only the pages of its plan, which is no checkpoint",
                hint=f"copy {self.name_or_path}, or load it without a plan or budget and save that",
            )
        return base.save_pretrained(self, *args, **kwargs)

    def resize_bits(self: Any, size: Size, *, reporter: Reporter | None = None) -> Resized:
        return resize(self, size, reporter=reporter)

    def reduce(self: Any, protocol: Any) -> Any:
        return _blank, (base,), self.__dict__

    signature = inspect.signature(base.forward)
    bits_parameter = inspect.Parameter("bits", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(signature.parameters.values())
    at = len(parameters) - (bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    parameters.insert(at, bits_parameter)
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    members = {
        "__call__": call,
        "forward": forward,
        "resize_token_embeddings": resize_token_embeddings,
        "save_pretrained": save_pretrained,
        "resize": resize_bits,
        "__reduce_ex__": reduce,  # the class is made here, so pickle and copy cannot look it up by name
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    if hasattr(base, "generate"):  # classifiers and plain encoders have none
        members["generate"] = _generate_with_bits(base)
    return type(base.__name__, (base,), members)


def _generate_with_bits(base: Any) -> Callable[..., Any]:
    @wraps(base.generate)
    def generate(
        self: Any,
        *args: Any,
        bits: Bits | None = None,
        draft_bits: int | None = None,
        draft_tokens: int = 4,
        **kwargs: Any,
    ) -> Any:
        if draft_bits is not None:
            speculation = Speculation(draft_bits, draft_tokens, streamer=kwargs.get("streamer"))
            kwargs = _with_draft(self, bits, speculation, kwargs)
        if bits is None:
            return base.generate(self, *args, **kwargs)
        with self.bits_state.using(bits):
            return base.generate(self, *args, **kwargs)

    return generate


@contextmanager
def _running(model: Any, bits: Bits | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """One forward pass of `model` on these arguments at `bits`, or at what is set; nothing changes them meanwhile."""
    state = model.bits_state
    with state.still():
        value = state.value if bits is None else bits
        fitted = _fit_rows(value, kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds"))
        if bits is not None and model.training and torch.is_grad_enabled():
            _check_checkpointing(model, bits)
        with state.using(bits if fitted is value else fitted):
            yield


def _check_checkpointing(model: Any, bits: Bits) -> None:
    """Raise UsageError if blocks that are run again in the backward pass would then run at other bits than `bits`."""
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return
    state = model.bits_state
    if isinstance(bits, (torch.Tensor, RowBits)) or state.check(bits) != state.value:
        raise UsageError(
            "with gradient checkpointing, blocks run again in the backward pass, after the bits of this call",
            hint="put the call and backward() inside `with bitstrata.use_bits(model, bits):`",
        )


def _with_draft(model: Any, bits: Bits | None, speculation: Speculation, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for transformers' generate; what comes of the draft will be in `model.speculation`."""
    state = model.bits_state
    checked = state.value if bits is None else state.check(bits)
    if isinstance(state, ResidentState):
        raise UsageError(
            "draft_bits needs a model with all of its planes; this one holds only the pages of its plan",
            hint="leave draft_bits out, or load the model without a plan, a budget or fit",
        )
    if not isinstance(checked, int):
        raise UsageError("draft_bits needs one bits value for the whole sequence, not a plan or one a row")
    speculation.check(state, checked)
    model.speculation = speculation
    kwargs = {**kwargs, "custom_generate": speculate, "speculation": speculation}
    strings, tokenizer = kwargs.pop("stop_strings", None), kwargs.pop("tokenizer", None)
    if strings is not None:  # transformers takes the tokenizer away from decoding methods that are not its own
        if tokenizer is None:
            raise UsageError("stop_strings need the tokenizer", hint="pass tokenizer= to generate")
        criteria = kwargs.get("stopping_criteria") or StoppingCriteriaList()
        kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer, strings)])
    return kwargs


def _blank(base: Any) -> Any:
    made = _class_with_bits(base)
    return made.__new__(made)


def _fit_rows(bits: Bits, ids: torch.Tensor | None, embeddings: torch.Tensor | None) -> Bits:
    """`bits` for an input of these tokens: those of rows one a token, anything else as it is."""
    if isinstance(bits, torch.Tensor):
        return _one_a_token(bits, ids, embeddings)
    if isinstance(bits, RowBits):
        rows = _one_a_token(bits.rows, ids, embeddings)
        return bits if rows is bits.rows else RowBits(bits.choices, rows)
    return bits


def _one_a_token(bits: torch.Tensor, ids: torch.Tensor | None, embeddings: torch.Tensor | None) -> torch.Tensor:
    """Per-sequence bits [batch] as [batch, sequence]: some models flatten tokens before a layer.

    A batch that generation widened (beams, several returns) repeats each sequence in place.
    Anything else is passed on as it is, and checked where it is used.
    """
    given = ids if ids is not None else embeddings
    if given is None or bits.dim() != 1 or bits.numel() == given.shape[:2].numel() or given.shape[0] % bits.numel():
        return bits
    return bits.repeat_interleave(given.shape[0] // bits.numel()).unsqueeze(1).expand(given.shape[:2])
