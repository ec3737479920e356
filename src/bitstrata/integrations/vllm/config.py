"""`quantization_config` of a checkpoint as vLLM knows it: which of vLLM's layers has which planes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from ...checkpoint import CheckpointReader, QuantizationSpec
from ...errors import UsageError
from ...planes.weights import MAX_BITS
from .embedding import PlaneVocabularyMethod
from .experts import PROJECTIONS, PlaneExpertsMethod
from .linear import PlaneLinearMethod
from .offered import serve
from .options import FIELD, ServeOptions, bits_of_linears
from .rows import Rows
from .stored import Stored
from .versions import check_version
from .waiting import wait_briefly
from .words import with_hints

# where a model does not say it, as some with shared experts
JOINED = {"gate_up_proj": ("gate_proj", "up_proj"), "qkv_proj": ("q_proj", "k_proj", "v_proj")}


class BitstrataConfig(QuantizationConfig):  # type: ignore[misc]
    """The quantization of one model that is served.

    Args:
        spec: of the checkpoint.
        options: what the operator set.
    """

    def __init__(self, spec: QuantizationSpec, options: ServeOptions) -> None:
        super().__init__()
        self.spec = spec
        self.layers = {name: name for name in spec.layers}  # vLLM's name -> the checkpoint's
        self.heads = {layer.tied: layer.tied for layer in spec.layers.values() if layer.tied}  # likewise
        self.draft = ""  # what vLLM calls the model, if it is a draft that shares the weights of another one
        self._take(options)

    def _take(self, options: ServeOptions, checkpoint: CheckpointReader | None = None) -> None:
        options.make_policy()
        self.options, self.offered = options, options.offer(self.spec, checkpoint)
        self.bits_of = bits_of_linears(self.spec, self.offered)
        self.needed: dict[str, frozenset[int]] = {}  # the bits that a layer is needed at, experts together
        for name, bits in self.bits_of.items():
            layer = self.spec.linears[name][0]
            self.needed[layer] = self.needed.get(layer, frozenset()).union(bits)
        self.loaded_bits = frozenset().union(*self.needed.values())
        tables = {name: bits for name, bits in self.bits_of.items() if name in self.needed}  # of no experts
        self.rows = Rows(tables, len(self.offered.choices), self.offered.place(self.offered.default))
        serve(self.offered)

    @property
    def most_planes(self) -> int:
        """As many as any layer without a role needs."""
        return max(self.loaded_bits)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        serve(self.offered)  # a server's further processes get the config from the first one

    def get_name(self) -> str:
        return "bitstrata"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    @with_hints()
    def from_config(cls, config: dict[str, Any]) -> BitstrataConfig:
        """From the `quantization_config` of a model; CheckpointError if it is none of ours or of a later format."""
        check_version(vllm.__version__)
        if current_platform.is_cpu():
            wait_briefly()
        return cls(QuantizationSpec.parse(config, "the model"), ServeOptions())

    @with_hints()
    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Take the operator's options from the model's config, and check the files of a model that is here already.

        Raises CheckpointError for what is missing or malformed, UsageError for options, PlanError for plans.
        """
        options = ServeOptions.parse(getattr(hf_config, FIELD, None))
        reader = CheckpointReader(model_name, checked=False) if Path(model_name).is_dir() else None
        self._take(options, reader)
        if reader is not None:
            CheckpointReader(model_name, max_bits=self.most_planes).note_changes()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Layers go by the names that vLLM's model has for them."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)
        self.heads = hf_to_vllm_mapper.apply_dict(self.heads)

    @property
    def unused(self) -> re.Pattern[str]:
        """Matches the names of planes and scales that no layer needs; layers with a role are read whole."""
        # models strip the outer names before they map them, so only the last part of a name is sure to be there
        roles = {name for name, own in self.layers.items() if own in self.spec.whole_layers} | self.spec.whole_layers
        last = {name.rpartition(".")[2] for name in roles}
        whole = "".join(rf"(?!(?:.*\.)?{re.escape(name)}\.)" for name in sorted(last))
        planes = "|".join(map(str, range(self.most_planes, MAX_BITS))) or "(?!)"
        scales = "|".join(str(bits) for bits in range(1, MAX_BITS + 1) if bits not in self.loaded_bits) or "(?!)"
        return re.compile(rf"^{whole}.*\.(?:plane_(?:{planes})|(?:scale|offset|unit|table)_(?:{scales}))$")

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Tensors that nobody needs are dropped by name, before they are read."""
        return WeightsMapper(orig_to_new_regex={self.unused: None})

    @with_hints()
    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How `layer`, called `prefix` in vLLM's model, is computed; None for layers that have no weights of ours."""
        prefix = prefix.removeprefix(self.draft)
        if isinstance(layer, LinearBase):
            names = self._names(prefix)
            rows = [self.rows.of_layer(name) for name in names]
            return PlaneLinearMethod(self._stored(names), rows, self.draft) if names else UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            if prefix in self.heads:
                return PlaneVocabularyMethod(None)
            names = self._names(prefix) or ([] if prefix or isinstance(layer, ParallelLMHead) else self._embedding())
            return PlaneVocabularyMethod(None if self.draft else self._stored(names)) if names else None
        if isinstance(layer, RoutedExperts):
            found = self._experts(prefix)
            if found and self.draft:
                raise UsageError(f"{prefix}: experts cannot be shared with a draft", hint="do without speculation")
            bias = any(self.spec.layers[name].bias for name in found.values())
            stored = {projection: self._stored([name]) for projection, name in found.items()}
            return PlaneExpertsMethod(layer.moe_config, stored, bias, self.rows, self.bits_of) if found else None
        return None

    def _experts(self, prefix: str) -> dict[str, str]:
        """Projection -> its layer of the checkpoint, of vLLM's experts `prefix`; nothing for ones not quantized."""
        inside = {own for name, own in self.layers.items() if name.startswith(f"{prefix}.")}
        merged = {own.rpartition(".")[2]: own for own in inside if self.spec.layers[own].experts is not None}
        if inside and merged.keys() != set(PROJECTIONS):
            raise UsageError(
                f"{prefix}: vLLM has experts of {', '.join(PROJECTIONS)}, the checkpoint {', '.join(sorted(inside))}",
                hint="use `bitstrata serve`",
            )
        return {name: merged[name] for name in PROJECTIONS if merged}

    def _stored(self, names: list[str]) -> Stored:
        needed = frozenset().union(*(self.needed.get(name, ()) for name in names))
        return Stored.of(self.spec, names, needed, self.loaded_bits)

    def _names(self, prefix: str) -> list[str]:
        """The layers of the checkpoint that vLLM's layer `prefix` holds; none for one that is not quantized."""
        if prefix in self.layers:
            return [self.layers[prefix]]
        parent, _, last = prefix.rpartition(".")
        joined = self.packed_modules_mapping.get(last) or JOINED.get(last, ())
        parts = [f"{parent}.{part}" for part in joined]
        found = [self.layers[part] for part in parts if part in self.layers]
        if found and len(found) < len(parts):
            missing = sorted(set(parts) - self.layers.keys())
            raise UsageError(f"vLLM joins {', '.join(found)} with {', '.join(missing)}, which are not quantized")
        return found

    def _embedding(self) -> list[str]:
        """The token embedding, which some models give no name."""
        return [name for name, layer in self.spec.layers.items() if layer.role == "embedding"]
