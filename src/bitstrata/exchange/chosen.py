"""A checkpoint at one number of bits, or one plan, as weights of numbers, read one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoint import CheckpointReader
from ..errors import UnsupportedBitsError
from ..models import resolve
from ..models.compat import new_model
from ..models.config import causal_class, read_config
from ..options import FromHub
from ..planes import PlaneWeight, decode
from ..plans import Plan, choose_bits, parse_bits_or_plan
from ..plans.parsing import as_whole


class Chosen:
    """The checkpoint `target` names (OUT or OUT:BITS) at `bits`: a number, a plan or a plan's file; None for the most.

    Raises what a reader does for a folder, UnsupportedBitsError and PlanError for bits that it has not.
    """

    def __init__(self, target: str | Path, bits: str | int | Mapping[str, int] | None, hub: FromHub) -> None:
        asked = parse_bits_or_plan(bits) if isinstance(bits, str) else as_whole(bits)
        if isinstance(asked, Mapping) and not isinstance(asked, Plan):
            asked = Plan(asked)
        name, asked = choose_bits(str(target), asked)
        self.folder = resolve(name, hub=hub, kind="bitstrata checkpoint")
        self.reader = CheckpointReader(self.folder)
        self.reader.note_changes()
        spec = self.reader.spec
        if isinstance(asked, Plan):
            asked.check(self.reader)
        elif asked is not None and asked not in self.reader.bits:
            raise UnsupportedBitsError(asked, self.reader.bits, where=str(self.folder))
        self.asked: int | Plan = max(self.reader.bits) if asked is None else asked
        self.bits = {name: max(spec.layer_bits(name)) for name in spec.linears}
        if asked is not None:
            self.bits |= dict(asked) if isinstance(asked, Plan) else dict.fromkeys(spec.planned_layers, asked)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """What config.json says, without the quantization."""
        config = read_config(self.folder, self.reader)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model without weights, on meta, its linears and experts as transformers has them."""
        with init_empty_weights(include_buffers=False):
            kind, own = causal_class(self.config)
            model = new_model(kind, own)
        model.tie_weights()
        return model

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the model was quantized in."""
        return self.reader.dtype or torch.float32

    def layer(self, name: str) -> PlaneWeight:
        """The planes of the linear `name`."""
        return self.reader.layer(name)

    def decoded(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight of the linear `name`: [N, K]."""
        return decode(self.layer(name), self.bits[name], dtype)

    @cached_property
    def kept(self) -> tuple[str, ...]:
        """The tensors that are not quantized, biases of quantized layers among them."""
        guards = {f"{layer}.weight" for layer in self.reader.spec.layers}
        return tuple(sorted(self.reader.common_names() - guards))
