"""Speculation without a second model: the draft is the same planes, at fewer bits.

vLLM builds a draft model as it builds any other, by the loader of the server, and gives it keys and values of its own.
Where the draft is the checkpoint that is being served, our loader reads nothing for it. Its layers multiply by the
weights that the model itself has packed, at `draft_bits`; norms, embeddings and whatever else holds weights are the
model's own modules, put into the draft's tree.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from ...errors import UsageError
from .config import BitstrataConfig
from .linear import PlaneLinearMethod
from .offered import serve
from .product import Product

_loaded: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()  # by folder or name; one model a process


def remember(model_config: ModelConfig, model: nn.Module, config: BitstrataConfig) -> None:
    """`model` is what the server serves: a draft may share its weights."""
    model.__dict__["bitstrata_config"] = config
    _loaded[model_config.model] = model


def target_of(model_config: ModelConfig) -> nn.Module:
    """The model whose weights the draft of this config shares; UsageError if there is none."""
    found = _loaded.get(model_config.model)
    if found is None:
        raise UsageError(
            f"the draft {model_config.model} is not the model that is served",
            hint="with --load-format bitstrata a draft is the same checkpoint at fewer bits: "
            '--speculative-config \'{"method": "draft_model", "model": OUT, "num_speculative_tokens": 4}\'',
        )
    return found


def share(draft: nn.Module, target: nn.Module, dtype: torch.dtype) -> None:
    """Let `draft`, just built, compute with the weights of `target`, whose operator chose the draft's bits."""
    config: BitstrataConfig = target.__dict__["bitstrata_config"]
    serve(config.offered)  # building the draft said what its own config offers
    rows = config.rows.fixed(config.offered.place(draft_bits(config)))
    theirs = dict(target.named_modules(remove_duplicate=False))
    for name, module in list(draft.named_modules(remove_duplicate=False)):
        if isinstance(module, AttentionLayerBase):
            if hasattr(module, "process_weights_after_loading"):
                module.process_weights_after_loading(dtype)
        elif isinstance(getattr(module, "quant_method", None), PlaneLinearMethod):
            product: Product = theirs[name].product
            module.product = product.at(rows)
        elif not any(True for _ in module.children()) and (module._parameters or module._buffers):
            parent, _, last = name.rpartition(".")
            setattr(draft.get_submodule(parent), last, theirs[name])
    shared = {id(parameter) for parameter in target.parameters()}
    for name, parameter in draft.named_parameters():
        if parameter.numel() and id(parameter) not in shared:
            raise UsageError(f"{name} of the model cannot be shared with a draft", hint="do without speculation")


def draft_bits(config: BitstrataConfig) -> int:
    """At how many bits drafts are made; UsageError unless that is less than what requests get by default."""
    chosen, default = config.options.draft_bits, config.offered.default
    bits = config.offered.bits[0] if chosen is None else chosen
    if bits not in config.offered.bits or (isinstance(default, int) and bits >= default):
        raise UsageError(
            f"drafts at {bits} bits of a model that runs at {default} cannot be made",
            hint=f"set draft_bits to one of {', '.join(map(str, config.offered.bits))}, below the bits of requests",
        )
    return bits
