"""How far exported weights are from the model that they were made of, on a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration import documents_of, evaluation_windows, read_mix
from ..errors import TextError
from ..metrics import Metrics, Tally
from ..models import check_vocabulary, context_limit, load_tokenizer
from ..models.config import causal_class
from ..progress import Steps
from .chosen import Chosen
from .tensors import model_tensors

SEQ_LEN = 512
MOST_TOKENS = 8192


def divergence(chosen: Chosen, written: Callable[[str], Tensor], text: str | Path) -> Metrics:
    """The model with the weights `written` gives for each quantized linear, measured against its own decoded weights.

    Both are computed in fp32, all in memory: two models at a time.

    Raises TextError for a text without a window of two tokens.
    """
    tokenizer = load_tokenizer(chosen.folder)
    documents = documents_of(read_mix(text, part="heldout"), tokenizer)
    limit = context_limit(chosen.config)
    length = SEQ_LEN if limit is None else min(SEQ_LEN, limit)
    windows = list(evaluation_windows(tokenizer, documents, length, MOST_TOKENS, "all"))
    if not windows:
        raise TextError("the text has no window of two tokens or more", hint="give a longer text")
    check_vocabulary((max(window) for window in windows), chosen.config, tokenizer)
    ours, theirs = _model(chosen, chosen.decoded), _model(chosen, written)
    tally = Tally()
    with torch.no_grad(), Steps("comparing", len(windows), "window") as steps:
        for window in windows:
            ids = torch.tensor([window])
            expected, found = (model(input_ids=ids, use_cache=False).logits[0, :-1] for model in (ours, theirs))
            tally.add(found, ids[0, 1:], expected)
            steps.step()
    return tally.result()


def _model(chosen: Chosen, weight: Callable[[str], Tensor]) -> PreTrainedModel:
    """The model in fp32 with these weights."""
    state = {entry.name: entry.read() for entry in model_tensors(chosen, torch.float32, weight, torch.float32)}
    kind, own = causal_class(chosen.config)
    model: PreTrainedModel = kind.from_pretrained(None, config=own, state_dict=state, dtype=torch.float32)
    model.eval()
    return model
