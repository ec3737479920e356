"""`bitstrata.evaluate`: how far a quantized model is from the original, at each bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .. import arguments
from ..calibration import SCORED, documents_of, read_mix
from ..errors import UsageError
from ..nn import multiplied_layers
from ..options import EvaluateOptions
from ..plans import bits_name
from ..progress import notes, own_notes
from ..torch_state import ordinary_torch
from ..verbs import verb
from .arithmetic import ARITHMETICS
from .margins import OnChats, measure_margins, read_chats
from .perplexity import OnText, measure_text
from .report import BitsResult, Evaluation
from .subject import Subject
from .tasks import OnTasks, check_tasks, measure_tasks


@verb(EvaluateOptions)
@ordinary_torch()
@own_notes()
def evaluate(options: EvaluateOptions) -> Evaluation:
    """Measure a quantized model on a text, on tasks, at the decisions of chats. `model` and `reference` may be loaded.

    `bits` is a number, a plan, several of them, or their names in a text: `2,3,plan.json`. Without `arithmetic`, the
    quantized layers compute as the model does for windows of this length; the result says which that was.

    Raises:
        UnsupportedBitsError, PlanError, TextError, ModelError, CheckpointError: the input named in the message.
        UsageError: nothing to measure; tasks without lm-evaluation-harness, or that it does not know.
        InputError: a task that fails.
        KernelError: nothing here computes in this arithmetic, or not the forced kernel.
    """
    seq_len, max_tokens = _checked(options)
    text = None if options.text is None else read_mix(options.text, part="heldout")
    chats = None if options.margins is None else read_chats(options.margins)
    subject = Subject.of(options)
    on_text, on_tasks, on_chats = None, None, None
    if text is not None:
        documents = documents_of(text, subject.tokenizer)
        on_text = measure_text(subject, documents, seq_len=seq_len, max_tokens=max_tokens, scored=options.scored)
    if options.tasks:
        on_tasks = measure_tasks(subject, options)
    if chats is not None:
        on_chats = measure_margins(subject, chats)
    arithmetics, kernels = subject.ran.names()
    return Evaluation(
        model=str(subject.model.name_or_path),
        text=None if options.text is None else str(options.text),
        tokens=0 if on_text is None else on_text.rows[0].tokens,
        seq_len=None if on_text is None else on_text.seq_len,
        scored=options.scored,
        reference=None if subject.original is None else _reference(on_text, on_tasks, on_chats),
        results=tuple(_rows(subject, on_text, on_tasks, on_chats)),
        arithmetic=arithmetics,
        kernel=kernels,
        tasks=None if on_tasks is None else on_tasks.asked,
        chats=None if options.margins is None else str(options.margins),
        notes=notes(),
    )


def _reference(on_text: OnText | None, on_tasks: OnTasks | None, on_chats: OnChats | None) -> dict[str, Any]:
    base = None if on_text is None else on_text.original
    return {
        "perplexity": None if base is None else base.perplexity,
        "nll": None if base is None else base.nll,
        "perplexity_error": None if base is None else base.perplexity_error,
        "tasks": None if on_tasks is None else on_tasks.original,
        "margins": None if on_chats is None else on_chats.original,
    }


def _checked(options: EvaluateOptions) -> tuple[int | None, int | None]:
    """seq_len and max_tokens, once everything was looked at that can be before a model is loaded.

    Raises UsageError for what cannot be used, and for unknown names."""
    if options.text is None and not options.tasks and options.margins is None:
        raise UsageError("nothing to measure", hint="give --text FILE, --tasks NAMES, --margins CHATS, or several")
    if options.tasks:
        check_tasks(options)
    if options.arithmetic not in (None, *ARITHMETICS):
        raise UsageError(f"arithmetic {options.arithmetic!r} is not known", hint=f"one of {', '.join(ARITHMETICS)}")
    if options.scored not in SCORED:
        raise UsageError(f"scored {options.scored!r} is not known", hint=f"one of {', '.join(SCORED)}")
    seq_len, max_tokens = options.seq_len, options.max_tokens
    if seq_len is not None:
        seq_len = arguments.number("seq_len", seq_len, 2, hint="tokens a window; leave it out for the usual length")
    if max_tokens is not None:
        max_tokens = arguments.number("max_tokens", max_tokens, 1, hint="leave it out to measure the whole text")
    return seq_len, max_tokens


def _rows(
    subject: Subject, on_text: OnText | None, on_tasks: OnTasks | None, on_chats: OnChats | None
) -> Iterator[BitsResult]:
    """What was measured, with the bytes that a token reads."""
    layers = multiplied_layers(subject.model)
    count = sum(layer.share * layer.in_features * layer.out_features for layer in layers)
    for number, bits in enumerate(subject.chosen):
        size = round(sum(layer.share * layer.bytes_read(bits) for layer in layers))
        row = None if on_text is None else on_text.rows[number]
        yield BitsResult(
            bits=bits_name(bits),
            perplexity=None if row is None else row.perplexity,
            nll=None if row is None else row.nll,
            kld=None if row is None else row.kld,
            top1_agreement=None if row is None else row.top1_agreement,
            bpw_read=8 * size / count,
            bytes=size,
            perplexity_error=None if row is None else row.perplexity_error,
            spread=None if row is None else row.spread,
            tasks=None if on_tasks is None else on_tasks.rows[number],
            margins=None if on_chats is None else on_chats.rows[number],
        )
