"""What a model's generation config wants: how tokens are sampled; and of its logits penalties, tokens that never come.

transformers makes its processors of them. A decoding method that looks at them and makes no token gets to see them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel

from ..errors import InputError
from .discover import input_device


@dataclass(frozen=True)
class SamplingDefaults:
    """How tokens are picked where nobody says it: by what changes nothing, or as the model's makers advise."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, config: GenerationConfig | None) -> SamplingDefaults:
        """What a generation config says; greedy where it says `do_sample: false`.

        Raises InputError for a value that cannot be used.
        """
        given = {} if config is None else config.to_diff_dict()
        found = {one.name: value for one in fields(cls) if (value := given.get(one.name)) is not None}
        made = cls(**found)
        right = (
            0 <= made.temperature < math.inf,
            0 < made.top_p <= 1,
            made.top_k >= 0,
            0 <= made.min_p <= 1,
            0 < made.repetition_penalty < math.inf,
        )
        for one, is_right in zip(fields(cls), right, strict=True):
            if not is_right:
                raise InputError(f"the model's generation config has {one.name}={getattr(made, one.name)}")
        return replace(made, temperature=0.0) if given.get("do_sample") is False else made


def score_rules(
    model: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int, ends: Iterable[int], **changes: Any
) -> LogitsProcessorList | None:
    """What `model.generate` does to the logits after `prompt`, but for temperature and the like; None for nothing.

    The list is called with tokens int64 [1, n], the prompt among them, and logits [1, V]. `model` may be running
    meanwhile in another thread. changes: of its generation config, for this once.
    """
    found: list[LogitsProcessorList] = []

    def look(model: PreTrainedModel, input_ids: Tensor, logits_processor: LogitsProcessorList, **_: Any) -> Tensor:
        found.append(logits_processor)
        return input_ids

    settings: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}
    if ends := sorted(ends):
        settings |= {"eos_token_id": ends, "pad_token_id": ends[0]}
    ids = torch.tensor([prompt], device=input_device(model))
    GenerationMixin.generate(  # not the model's own, which sets bits
        model,  # type: ignore[arg-type]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        use_cache=False,
        custom_generate=look,
        **settings | changes,
    )
    return found[0] if found[0] else None
