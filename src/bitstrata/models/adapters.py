"""Low-rank adapters (LoRA, arXiv 2106.09685) beside planes, by PEFT: y = x W_bits^T + s x A^T B^T.

The planes stay as they are, at whatever bits; A and B are trained and kept beside them. W is on a grid, so no adapter
can be merged into it: for that, export the weights and merge there.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from transformers import PreTrainedModel

from ..errors import InputError, UsageError, first_line
from ..nn import PlaneLinear
from ..options import FromHub
from .compat import adapt_layers
from .hub import resolve

CONFIG = "adapter_config.json"
UNMERGED = "an adapter cannot be merged into planes"
NO_WEIGHT = (False, True, "gaussian", "orthogonal", "eva")  # ways to begin that ask for no W to be changed


def check_peft() -> None:
    """Raise UsageError if PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UsageError("adapters need peft, not installed here", hint="pip install 'bitstrata[lora]'")


def lora_on_planes(model: PreTrainedModel, config: Any) -> Any:
    """`config`, a peft.LoraConfig, so that PEFT knows what to put beside layers in planes; the same object.

    `model.add_adapter` and `model.load_adapter` call this. For PEFT's own functions call it yourself:

        peft.get_peft_model(model, bitstrata.lora_on_planes(model, peft.LoraConfig(...)))

    target_modules "all-linear" stands for all layers of the blocks that are in planes.

    Raises UsageError if PEFT is not installed, and for a config that is not a LoraConfig or asks for what needs W.
    """
    check_peft()
    import peft

    if not isinstance(config, peft.LoraConfig):
        raise UsageError(
            f"{type(config).__name__} cannot be used beside planes", hint="give a peft.LoraConfig: low-rank adapters"
        )
    if config.use_dora:
        raise UsageError("DoRA scales the columns of W, which planes do not let it", hint="leave use_dora out")
    if config.init_lora_weights not in NO_WEIGHT:
        raise UsageError(
            f"init_lora_weights={config.init_lora_weights!r} takes a part of W away, which planes do not let it",
            hint=f"one of {', '.join(map(repr, NO_WEIGHT))}",
        )
    if config.target_modules == "all-linear":
        layers = {name for name, module in model.named_modules() if isinstance(module, PlaneLinear)}
        head = model.get_output_embeddings()
        blocks = {name for name in layers if head is None or model.get_submodule(name) is not head}
        config.target_modules = sorted({name.rpartition(".")[2] for name in blocks})
    adapt_layers(config, {PlaneLinear: _plane_lora()})
    return config


def add_stored(model: PreTrainedModel, adapter: str | Path, hub: FromHub) -> None:
    """Load the adapter of a folder or hub id, which `hub` says how to fetch, and run `model` with it.

    Raises:
        UsageError: PEFT is not installed, or as `lora_on_planes`.
        InputError: it is not there, damaged, or of another model.
    """
    check_peft()
    place = os.path.expanduser(adapter)
    if os.path.isdir(place) and not os.path.isfile(os.path.join(place, CONFIG)):
        raise InputError(f"{adapter} holds no adapter: {CONFIG} is not there", hint="give what save_pretrained wrote")
    try:
        found = model.load_adapter(str(resolve(place, hub=hub, kind="adapter", weights=False)))
    except UsageError:
        raise
    except Exception as error:  # whatever PEFT, transformers and the hub raise for what is missing or does not fit
        raise InputError(
            f"the adapter {adapter} cannot be used: {first_line(error)}",
            hint="give the folder or hub id of a LoRA adapter that was trained on this model",
        ) from error
    if wrong := sorted({*found.missing_keys, *found.unexpected_keys}):
        raise InputError(
            f"the adapter {adapter} is of another model: {len(wrong)} of its tensors have no place or are missing, "
            f"{wrong[0]} for one",
            hint="give one that was trained on this model",
        )


def read_config(adapter: str, settings: dict[str, Any]) -> Any:
    """What `adapter`, a folder or hub id, is: a peft.PeftConfig. settings: of transformers' `load_adapter`."""
    check_peft()
    import peft

    hub = {name: settings[name] for name in ("token", "revision", "cache_dir", "subfolder") if name in settings}
    return peft.PeftConfig.from_pretrained(adapter, **hub, **(settings.get("adapter_kwargs") or {}))


@cache
def _plane_lora() -> Any:
    """The class of a layer in planes with adapters; made when PEFT is there."""
    from peft.tuners.lora.layer import Linear

    class PlaneLora(Linear):
        @property
        def lora_variants(self) -> dict[tuple[str, ...], Any]:
            return {(): None}

        def _get_in_out_features(self, module: Any) -> tuple[int, int]:
            return module.in_features, module.out_features

        def merge(self, *_: Any, **__: Any) -> NoReturn:
            raise UsageError(
                UNMERGED, hint="keep it beside them; or `bitstrata export OUT --format dense` and merge into that"
            )

    return PlaneLora
