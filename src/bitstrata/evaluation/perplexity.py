"""`bitstrata.evaluate`: perplexity, KL divergence and top-1 agreement at each bits, streamed over a text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import arguments
from ..calibration import evaluation_windows, given_tokens, read_text
from ..checkpoint import CheckpointReader, is_checkpoint
from ..errors import TextError, UsageError
from ..metrics import Tally
from ..models import (
    check_vocabulary,
    context_limit,
    input_device,
    load_reference,
    load_tokenizer,
    resolve,
)
from ..models.load import pick_device
from ..nn import BitsOrPlan, bits_state, multiplied_layers
from ..options import EvaluateOptions
from ..planes import whole_number
from ..plans import Plan, bits_name, highest_bits, load, parse_bits_or_plans
from ..progress import Steps, note, notes, own_notes
from ..torch_state import ordinary_torch
from ..verbs import verb
from .arithmetic import ARITHMETICS, Ran
from .report import BitsResult, Evaluation

TOKENS_PER_BATCH = 2048
DEFAULT_SEQ_LEN = 2048


@verb(EvaluateOptions)
@ordinary_torch()
@own_notes()
def evaluate(options: EvaluateOptions) -> Evaluation:
    """Measure a quantized model on a text. `model` and `reference` may be loaded models as well.

    `bits` is a number, a plan, several of them, or their names in a text: `2,3,plan.json`. Without `arithmetic`, the
    quantized layers compute as the model does for windows of this length; the result says which that was.

    Raises:
        UnsupportedBitsError, PlanError, TextError, ModelError, CheckpointError: the input named in the message.
        KernelError: nothing here computes in this arithmetic, or not the forced kernel.
    """
    model, text = options.model, options.text
    seq_len, max_tokens = _checked(options)
    documents = read_text(text, part="heldout")
    where = input_device(model) if isinstance(model, PreTrainedModel) else pick_device(options.device)
    asked = _asked(options.bits)
    _check_plans(asked or (), model)
    highest = None if asked is None else max(map(highest_bits, asked))
    # float32 on a CPU: exact, and no slower there; elsewhere the dtype the model is stored in
    dtype = torch.float32 if where.type == "cpu" else None
    quantized = (
        model if isinstance(model, PreTrainedModel) else load(model, device=where, dtype=dtype, max_bits=highest)
    )
    state = bits_state(quantized)
    # a plan in memory is neither of these numbers nor a name for one
    chosen: tuple[BitsOrPlan, ...] = asked if asked is not None else state.supported or (state.default,)
    for value in chosen:
        state.resolve(value)
    tokenizer = options.tokenizer or load_tokenizer(resolve(str(quantized.name_or_path)))
    original = load_reference(options.reference, quantized, where)
    length = context_length(quantized, seq_len)

    batches = list(_batches(evaluation_windows(tokenizer, documents, length, max_tokens)))
    given = given_tokens(tokenizer)
    check_vocabulary((max(window) for batch in batches for window in batch), quantized.config, tokenizer)
    if not batches:
        raise TextError(f"{text} has no window of two tokens or more", hint="give a longer text")
    tallies, baseline, ran = [Tally() for _ in chosen], Tally(), Ran(quantized)
    with torch.no_grad(), Steps("evaluating", len(batches), "batch") as steps:
        for windows in batches:
            ids, predicted = _padded(windows, given, where)
            targets, expected = ids[predicted], None
            if original is not None:
                expected = _logits(original, ids, predicted)
                baseline.add(expected, targets)
            for value, tally in zip(chosen, tallies, strict=True):
                with state.using(value, options.arithmetic), ran.watching():
                    tally.add(_logits(quantized, ids, predicted), targets, expected)
            steps.step()
    results = _rows(quantized, chosen, tallies)
    base = baseline.result() if original is not None else None
    arithmetics, kernels = ran.names()
    return Evaluation(
        model=str(quantized.name_or_path),
        text=str(text),
        tokens=tallies[0].tokens,
        seq_len=length,
        reference=None if base is None else {"perplexity": base.perplexity, "nll": base.nll},
        results=results,
        arithmetic=arithmetics,
        kernel=kernels,
        notes=notes(),
    )


def _checked(options: EvaluateOptions) -> tuple[int | None, int | None]:
    """seq_len and max_tokens. Raises UsageError for what cannot be used, and for an unknown arithmetic."""
    if options.arithmetic not in (None, *ARITHMETICS):
        raise UsageError(f"arithmetic {options.arithmetic!r} is not known", hint=f"one of {', '.join(ARITHMETICS)}")
    seq_len, max_tokens = options.seq_len, options.max_tokens
    if seq_len is not None:
        seq_len = arguments.number("seq_len", seq_len, 2, hint="tokens a window; leave it out for the usual length")
    if max_tokens is not None:
        max_tokens = arguments.number("max_tokens", max_tokens, 1, hint="leave it out to measure the whole text")
    return seq_len, max_tokens


def _asked(bits: str | Sequence[int | Plan] | int | Plan | None) -> tuple[int | Plan, ...] | None:
    """What to measure. Raises UsageError for what is neither bits nor a plan, or nothing at all."""
    if bits is None:
        return None
    if isinstance(bits, str):
        return parse_bits_or_plans(bits)
    whole = whole_number(bits)
    if whole is not None:
        return (whole,)
    given = [bits] if isinstance(bits, Mapping) or not isinstance(bits, Iterable) else list(bits)
    asked = [_one_asked(value) for value in given]
    if not asked:
        raise UsageError("no bits are given to measure", hint="leave bits out to measure all of them")
    return tuple(asked)


def _one_asked(value: object) -> int | Plan:
    if isinstance(value, Mapping):
        return value if isinstance(value, Plan) else Plan(value)
    whole = whole_number(value)
    if whole is None:
        raise UsageError(f"bits {value!r} cannot be measured", hint="bits are whole numbers from 1 to 8, or plans")
    return whole


def _check_plans(asked: Sequence[int | Plan], model: str | Path | PreTrainedModel) -> None:
    """Raise PlanError for a plan that was made for another checkpoint than that of `model`, if there is one."""
    if isinstance(model, PreTrainedModel):
        folder = Path(str(model.name_or_path))
    else:
        folder = resolve(model, kind="bitstrata checkpoint")
    for plan in asked:
        if isinstance(plan, Plan) and is_checkpoint(folder):
            plan.check(CheckpointReader(folder))


def _rows(model: PreTrainedModel, chosen: Sequence[BitsOrPlan], tallies: Sequence[Tally]) -> tuple[BitsResult, ...]:
    """What was measured, with the bytes that a token reads."""
    layers = multiplied_layers(model)
    count = sum(layer.share * layer.in_features * layer.out_features for layer in layers)
    rows = []
    for bits, tally in zip(chosen, tallies, strict=True):
        size, found = round(sum(layer.share * layer.bytes_read(bits) for layer in layers)), tally.result()
        bpw = 8 * size / count
        rows.append(
            BitsResult(bits_name(bits), found.perplexity, found.nll, found.kld, found.top1_agreement, bpw, size)
        )
    return tuple(rows)


def context_length(model: PreTrainedModel, seq_len: int | None) -> int:
    """`seq_len` (default 2048), lowered to the model's context with a note."""
    limit = context_limit(model.config)
    wanted = DEFAULT_SEQ_LEN if seq_len is None else seq_len
    if limit is None or wanted <= limit:
        return wanted
    if seq_len is not None:
        note(f"seq-len lowered from {seq_len} to {limit}, the model's context")
    return int(limit)


def _batches(windows: Iterator[list[int]]) -> Iterator[list[list[int]]]:
    """Windows of similar length together, at most TOKENS_PER_BATCH tokens each, padding counted."""
    pending: list[list[int]] = []
    for window in sorted(windows, key=len, reverse=True):
        if pending and len(pending[0]) * (len(pending) + 1) > TOKENS_PER_BATCH:
            yield pending
            pending = []
        pending.append(window)
    if pending:
        yield pending


def _padded(windows: list[list[int]], given: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids int64 [b, S], padded on the right with 0, and which of them are to be predicted: bool [b, S].

    given: tokens at the start of each window that are not.
    """
    longest = max(map(len, windows))
    ids = torch.zeros(len(windows), longest, dtype=torch.int64)
    predicted = torch.zeros(len(windows), longest, dtype=torch.bool)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = torch.tensor(window)
        predicted[row, given : len(window)] = True
    return ids.to(device), predicted.to(device)


def _logits(model: PreTrainedModel, ids: Tensor, predicted: Tensor) -> Tensor:
    """Logits [s, vocab] from which the tokens marked in `predicted` are predicted.

    Padding is on the right and attention is causal, so real positions never see it.
    """
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[:, :-1][predicted[:, 1:]]
