"""The way into transformers: a quantization config, a quantizer, and models that take `bits`.

Importing this module registers quant_method "bitstrata", after which plain
`AutoModelForCausalLM.from_pretrained(OUT)` builds layers that run from planes and loads planes into them.
A loaded model's class is a subclass, with the same name, whose `forward` and `generate` take
`bits=`; the outermost call sets the shared BitsState and restores it on the way out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteriaList, StopStringCriteria
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint import QUANT_METHOD, CheckpointReader, QuantizationSpec
from ..errors import UsageError
from ..nn import (
    Bits,
    BitsState,
    FixedBits,
    PlaneEmbedding,
    PlaneLinear,
    ResidentState,
    RowBits,
    bits_state,
    fuse,
    prepare_layers,
    use_bits,
)
from ..progress import Reporter
from .attention import use_grouped_sdpa
from .head import check_untied, put_embedding
from .modules import linear_of, set_submodule, submodule
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

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if checkpoint_files:
            reader = CheckpointReader(Path(checkpoint_files[0]).parent)  # names whatever is missing or malformed
            reader.note_changes(Reporter())
        replace_layers(model, self.quantization_config.spec, paged=self.quantization_config.paged)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        return attach(model)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def replace_layers(model: PreTrainedModel, spec: QuantizationSpec, *, paged: bool = False) -> BitsState:
    """Put planes in the place of every layer that `spec` names; those without a role share one BitsState.

    Args:
        paged: those start without pages (models/resize.py).

    Raises CheckpointError if a layer is not in the model or has another size there.
    """
    layers = {name: spec.layer_bits(name) for name in spec.planned_layers}
    state = ResidentState(layers) if paged else BitsState(tuple(spec.bits), layers)
    for name, layer in spec.layers.items():
        place = linear_of(model, name, layer) if layer.role != "embedding" else submodule(model, name)
        weight = place.weight
        shared: dict[str, Any] = {
            "group_size": spec.layer_group_size(name),
            "decoder": layer.decoder,
            "device": weight.device,
            "dtype": weight.dtype,
        }
        if layer.role == "embedding":
            put_embedding(model, name, layer, shared)
            continue
        if layer.role == "head":
            check_untied(model, name)
        bits = spec.layer_bits(name)
        linear = PlaneLinear(
            layer.in_features,
            layer.out_features,
            name=name,
            state=state if layer.role is None else FixedBits(bits[0]),
            bits=bits,
            bias=layer.bias,
            paged=paged and layer.role is None,
            **shared,
        )
        set_submodule(model, name, linear)
    return state


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Give `model`'s `forward` and `generate` a `bits` argument and its layers the kernels' layout; the same object."""
    bits_state(model)  # raises if nothing is quantized
    prepare_layers(model)
    fuse(model)
    use_grouped_sdpa(model)
    if not getattr(type(model), "_takes_bits", False):
        model.__class__ = _class_with_bits(type(model))  # type: ignore[arg-type]
    return model


@cache
def _class_with_bits(base: Any) -> Any:
    """A subclass of `base` under the same name whose forward and generate take `bits`."""

    @wraps(base.forward)
    def forward(self: Any, *args: Any, bits: Bits | None = None, **kwargs: Any) -> Any:
        state = bits_state(self)
        if isinstance(state, ResidentState):
            return _step(state, bits, partial(base.forward, self, *args, **kwargs))
        if bits is None:
            current = state.value
            if not isinstance(current, (torch.Tensor, RowBits)):
                return base.forward(self, *args, **kwargs)
            bits = current
        if isinstance(bits, (torch.Tensor, RowBits)):
            ids, embeddings = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
            if isinstance(bits, RowBits):
                bits = RowBits(bits.choices, _one_a_token(bits.rows, ids, embeddings))
            else:
                bits = _one_a_token(bits, ids, embeddings)
        with use_bits(self, bits):
            return base.forward(self, *args, **kwargs)

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
        with use_bits(self, bits):
            return base.generate(self, *args, **kwargs)

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
        if isinstance(bits_state(self), ResidentState):
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
        "forward": forward,
        "generate": generate,
        "resize_token_embeddings": resize_token_embeddings,
        "save_pretrained": save_pretrained,
        "resize": resize_bits,
        "__reduce_ex__": reduce,  # the class is made here, so pickle and copy cannot look it up by name
        "_takes_bits": True,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base,), members)


def _step(state: ResidentState, bits: Bits | None, forward: Callable[[], Any]) -> Any:
    """One forward pass at the plan in memory; `bits` may only say so. Compilers trace it without the lock."""
    if bits is not None:
        state.check(bits)
    if torch.compiler.is_compiling():
        return forward()
    with state.still():
        return forward()


def _with_draft(model: Any, bits: Bits | None, speculation: Speculation, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for transformers' generate; what comes of the draft will be in `model.speculation`."""
    state = bits_state(model)
    checked = state.value if bits is None else bits
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


def _one_a_token(bits: torch.Tensor, ids: torch.Tensor | None, embeddings: torch.Tensor | None) -> torch.Tensor:
    """Per-sequence bits [batch] as [batch, sequence]: some models flatten tokens before a layer.

    A batch that generation widened (beams, several returns) repeats each sequence in place.
    Anything else is passed on as it is, and checked where it is used.
    """
    given = ids if ids is not None else embeddings
    if given is None or bits.dim() != 1 or bits.numel() == given.shape[:2].numel() or given.shape[0] % bits.numel():
        return bits
    return bits.repeat_interleave(given.shape[0] // bits.numel()).unsqueeze(1).expand(given.shape[:2])
