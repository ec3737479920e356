"""`bitstrata.evaluate`: how far a quantized model is from the original, at each bits."""

from __future__ import annotations

from collections.abc import Iterator

from .. import arguments
from ..calibration import SCORED
from ..errors import UsageError
from ..metrics import Metrics
from ..nn import multiplied_layers
from ..options import EvaluateOptions
from ..plans import bits_name
from ..progress import notes, own_notes
from ..torch_state import ordinary_torch
from ..verbs import verb
from .arithmetic import ARITHMETICS
from .perplexity import measure_text
from .report import BitsResult, Evaluation
from .subject import Subject


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
    seq_len, max_tokens = _checked(options)
    subject = Subject.of(options)
    found = measure_text(subject, options.text, seq_len=seq_len, max_tokens=max_tokens, scored=options.scored)
    base = found.original
    arithmetics, kernels = subject.ran.names()
    return Evaluation(
        model=str(subject.model.name_or_path),
        text=str(options.text),
        tokens=found.rows[0].tokens,
        seq_len=found.seq_len,
        scored=options.scored,
        reference=None
        if base is None
        else {"perplexity": base.perplexity, "nll": base.nll, "perplexity_error": base.perplexity_error},
        results=tuple(_rows(subject, found.rows)),
        arithmetic=arithmetics,
        kernel=kernels,
        notes=notes(),
    )


def _checked(options: EvaluateOptions) -> tuple[int | None, int | None]:
    """seq_len and max_tokens. Raises UsageError for what cannot be used, and for unknown names."""
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


def _rows(subject: Subject, found: tuple[Metrics, ...]) -> Iterator[BitsResult]:
    """What was measured, with the bytes that a token reads."""
    layers = multiplied_layers(subject.model)
    count = sum(layer.share * layer.in_features * layer.out_features for layer in layers)
    for bits, row in zip(subject.chosen, found, strict=True):
        size = round(sum(layer.share * layer.bytes_read(bits) for layer in layers))
        yield BitsResult(
            bits=bits_name(bits),
            perplexity=row.perplexity,
            nll=row.nll,
            kld=row.kld,
            top1_agreement=row.top1_agreement,
            bpw_read=8 * size / count,
            bytes=size,
            perplexity_error=row.perplexity_error,
            spread=row.spread,
        )
