"""BitstrataConfig: what transformers' loaders are told of our quantization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint import QUANT_METHOD, QuantizationSpec
from .on_the_fly import Recipe


@register_quantization_config(QUANT_METHOD)
class BitstrataConfig(QuantizationConfigMixin):
    """How a model is to be quantized while transformers loads it, or how a checkpoint of ours is.

        AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=BitstrataConfig(bits="2-4"))

    Args:
        bits: to support, each 1 to 8: "2-4", "2,4" or 3.
        method, preset, options: as in `bitstrata.quantize`; none that learns from a text.
        group_size: input columns that share scales.
        skip: layers to leave: globs, or `re:` and a regular expression.

    Raises UsageError for what cannot be used. From a checkpoint's config.json it has the fields of FORMAT.md, and
    raises CheckpointError naming the one that is wrong.
    """

    def __init__(
        self,
        *,
        bits: Any = "2-4",
        method: str = "nested",
        preset: str = "fast",
        group_size: int = 128,
        options: Mapping[str, Any] | None = None,
        skip: str | Sequence[str] = (),
        paged: bool = False,
        **fields: Any,
    ) -> None:
        """`paged` is never in a file: `load` asks with it for layers that start without pages."""
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.paged = paged
        self.recipe: Recipe | None = None
        if not fields:
            self.recipe = Recipe.parse(bits, method, preset, group_size, options, skip)
            return
        stored = {"bits": bits, "method": method, "group_size": group_size, "quant_method": QUANT_METHOD, **fields}
        self.spec = QuantizationSpec.parse(stored, "the model's config.json")

    def to_dict(self) -> dict[str, Any]:
        if self.recipe is not None:
            return {"quant_method": QUANT_METHOD, **self.recipe.to_dict()}
        return self.spec.model_dump(exclude_none=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> BitstrataConfig:
        return self  # the spec is frozen
