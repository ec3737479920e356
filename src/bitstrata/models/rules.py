"""What a model's generation config wants of its logits: penalties, tokens that never come or come first.

transformers makes its processors of them. A decoding method that looks at them and makes no token gets to see them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from .discover import input_device


def score_rules(
    model: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int, ends: Iterable[int]
) -> LogitsProcessorList | None:
    """What `model.generate` does to the logits after `prompt`, but for temperature and the like; None for nothing.

    The list is called with tokens int64 [1, n], the prompt among them, and logits [1, V].
    """
    found: list[LogitsProcessorList] = []

    def look(model: PreTrainedModel, input_ids: Tensor, logits_processor: LogitsProcessorList, **_: Any) -> Tensor:
        found.append(logits_processor)
        return input_ids

    settings: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}
    if ends := sorted(ends):
        settings |= {"eos_token_id": ends, "pad_token_id": ends[0]}
    ids = torch.tensor([prompt], device=input_device(model))
    model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, custom_generate=look, **settings
    )
    return found[0] if found[0] else None
