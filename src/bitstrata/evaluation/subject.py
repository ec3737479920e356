"""What is measured: a quantized model at some bits, and the original to compare it with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint import CheckpointReader, is_checkpoint
from ..errors import UsageError
from ..models import input_device, load_reference, load_tokenizer, resolve
from ..models.load import pick_device
from ..nn import BitsOrPlan, bits_state
from ..options import EvaluateOptions, FromHub
from ..planes import whole_number
from ..plans import Plan, highest_bits, load, parse_bits_or_plans
from .arithmetic import Ran


@dataclass(frozen=True)
class Subject:
    """A loaded model and what it is measured at.

    chosen: bits and plans, a row of the result each. ran: the arithmetic and kernels of its products so far.
    """

    model: PreTrainedModel
    chosen: tuple[BitsOrPlan, ...]
    original: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    arithmetic: str | None
    ran: Ran

    @classmethod
    def of(cls, options: EvaluateOptions) -> Subject:
        """Load what the options name; those that are loaded already stay as they are.

        Raises what `evaluate` does for bits, plans, checkpoints, the reference and the tokenizer.
        """
        model = options.model
        where = input_device(model) if isinstance(model, PreTrainedModel) else pick_device(options.device)
        asked = _asked(options.bits)
        _check_plans(asked or (), model, options.hub)
        highest = None if asked is None else max(map(highest_bits, asked))
        # float32 on a CPU: exact, and no slower there; elsewhere the dtype the model is stored in
        dtype = torch.float32 if where.type == "cpu" else None
        quantized = (
            model
            if isinstance(model, PreTrainedModel)
            else load(model, device=where, dtype=dtype, max_bits=highest, **vars(options.hub))
        )
        state = bits_state(quantized)
        # a plan in memory is neither of these numbers nor a name for one
        chosen: tuple[BitsOrPlan, ...] = asked if asked is not None else state.supported or (state.default,)
        for value in chosen:
            state.resolve(value)
        tokenizer = options.tokenizer or load_tokenizer(resolve(str(quantized.name_or_path)))
        original = load_reference(options.reference, quantized, where, options.other)
        return cls(quantized, chosen, original, tokenizer, where, options.arithmetic, Ran(quantized))

    @contextmanager
    def at(self, value: BitsOrPlan) -> Iterator[PreTrainedModel]:
        """The model, which runs at `value` inside; what runs is noted."""
        with torch.no_grad(), bits_state(self.model).using(value, self.arithmetic), self.ran.watching():
            yield self.model


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


def _check_plans(asked: Sequence[int | Plan], model: str | Path | PreTrainedModel, hub: FromHub) -> None:
    """Raise PlanError for a plan that was made for another checkpoint than that of `model`, if there is one."""
    if isinstance(model, PreTrainedModel):
        folder = Path(str(model.name_or_path))
    else:
        folder = resolve(model, hub=hub, kind="bitstrata checkpoint")
    for plan in asked:
        if isinstance(plan, Plan) and is_checkpoint(folder):
            plan.check(CheckpointReader(folder))
