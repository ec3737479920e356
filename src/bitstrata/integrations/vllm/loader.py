"""`--load-format bitstrata`: vLLM's own loader, which then tells model runner V2 of the bits.

It also leaves alone the files that hold nothing but planes and scales that no request can ask for; those above all that
it needs need not be there.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.utils.torch_utils import set_default_torch_dtype

from ...checkpoint import CheckpointReader
from ...errors import UsageError
from .config import BitstrataConfig
from .speculation import remember, share, target_of
from .state import bits_state
from .words import with_hints


class BitstrataLoader(DefaultModelLoader):  # type: ignore[misc]
    """Loads safetensors, as vLLM does."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(replace(load_config, load_format="safetensors"))

    @with_hints()
    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """The model with its weights; a draft gets those of the model that is served (speculation.py)."""
        if model_config.runner_type != "draft":
            loaded: nn.Module = super().load_model(vllm_config, model_config, prefix)
            remember(model_config, loaded, vllm_config.quant_config)
            return loaded
        target = target_of(model_config)
        vllm_config.quant_config.draft = f"{prefix}." if prefix else ""
        with set_default_torch_dtype(model_config.dtype), torch.device(vllm_config.device_config.device):
            draft: nn.Module = super().create_model(vllm_config, model_config, prefix)
        share(draft, target, model_config.dtype)
        return draft.eval()

    @with_hints()
    def create_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        config = vllm_config.quant_config
        if not isinstance(config, BitstrataConfig):
            raise UsageError("--load-format bitstrata is for bitstrata checkpoints, and this model is none")
        model: Any = super().create_model(vllm_config, model_config, prefix)
        model.is_unused_checkpoint_weight = partial(_matches, config.unused)
        if _lacks_files(Path(model_config.model), config):
            model.allow_patterns_overrides = ["model*.safetensors"]  # vLLM asks for all files of the index otherwise
        if vllm_config.use_v2_model_runner:
            from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

            model.get_model_state_cls = partial(bits_state, resolve_model_state_cls(vllm_config, model))
        found: nn.Module = model
        return found


def _matches(pattern: Any, name: str) -> bool:
    return pattern.search(name) is not None


def _lacks_files(folder: Path, config: BitstrataConfig) -> bool:
    """Whether some files of a checkpoint on this machine were left out; those that are needed have been looked at."""
    if not folder.is_dir():
        return False
    files = set(CheckpointReader(folder, max_bits=config.most_planes, checked=False).weight_map.values())
    return not all((folder / file).exists() for file in files)
