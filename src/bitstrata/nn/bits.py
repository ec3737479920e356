"""BitsState: how bits travel from a model's caller to its layers.

All quantized layers of one model share one BitsState. It holds

    an int           the uniform plan,
    a plan           a mapping from layer name to bits,
    a tensor         integers, one entry a row: [rows], or [batch] / [batch, sequence] of the input, or
    a RowBits        rows at different plans, or some at plans and some at uniform bits.

There is no module-level state: two models never affect each other. Setting it copies no weights. Threads that run one
model at the same time must agree (uses.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..checkpoint import Fingerprint, Plan
from ..errors import UnsupportedBitsError, UsageError
from ..planes.weights import MAX_BITS, whole_number
from .uses import Use, Uses, here

Precision = int | Mapping[str, int]  # of one sequence: uniform bits, or a plan


@dataclass(frozen=True, eq=False)
class RowBits:
    """For a batch whose rows run at different plans.

    Args:
        choices: what the rows run at; each is that of at least one row.
        rows: for every row the index of its choice; integers, shaped as a tensor of per-row bits would be.

    Raises UsageError for a choice that is neither an int nor a plan, and for rows that are not indices of choices
    (on a GPU, where looking would wait for it, only for those that are not integers).
    """

    choices: tuple[Precision, ...]
    rows: Tensor
    _known: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        whole = tuple(choice if isinstance(choice, Mapping) else whole_number(choice) for choice in self.choices)
        for choice, given in zip(whole, self.choices, strict=True):
            if choice is None:
                raise UsageError(f"the choices of RowBits are ints and plans, got {given!r}")
        object.__setattr__(self, "choices", whole)
        _check_integers(self.rows)
        if self.rows.device.type == "cpu" and not set(self.rows.unique().tolist()) <= set(range(len(self.choices))):
            raise UsageError(f"rows of RowBits are indices of its {len(self.choices)} choices")

    def of(self, layer: str) -> int | Tensor:
        """The bits of `layer`: an int where all choices agree, else one entry a row, int8 in the shape of `rows`."""
        bits = tuple(choice if isinstance(choice, int) else choice[layer] for choice in self.choices)
        if len(set(bits)) == 1:
            return int(bits[0])
        if bits not in self._known:  # few combinations serve all layers: on a GPU each copies once, not once a layer
            self._known[bits] = torch.tensor(bits, dtype=torch.int8, device=self.rows.device)[self.rows.long()]
        return self._known[bits]


Bits = Precision | Tensor | RowBits


class BitsState:
    """The bits that a model's quantized layers use now.

    Args:
        supported: bits for which the model has scales.
        layers: for each quantized layer its supported bits; a plan must name exactly these layers.
        value: the bits to start with; the highest supported by default.
    """

    made_from: Fingerprint | None = None  # the checkpoint, where whoever loaded the model knows it
    arithmetic: str | None = None  # that every layer computes in; None for what the kernel that runs does

    def __init__(self, supported: tuple[int, ...], layers: Mapping[str, tuple[int, ...]], value: Bits | None = None):
        self.supported = supported
        self.layers = dict(layers)
        self.value: Bits = max(supported)
        self._begin()
        if value is not None:
            self.set(value)

    def _begin(self) -> None:
        self._base = self.value  # what runs outside of every use
        self._uses = Uses()

    @property
    def default(self) -> Precision:
        """What runs where nobody names bits: the highest supported."""
        return max(self.supported)

    def keep(self, value: Precision | None) -> Precision:
        """`value`, or the default, for somebody who will run at it for a while; raises as `set` does.

        A plan becomes a copy of its own, in the order of the model's layers.
        """
        checked = self.default if value is None else self.check(value)
        if isinstance(checked, Mapping):
            return {layer: checked[layer] for layer in self.layers}
        assert isinstance(checked, int)
        return checked

    def still(self) -> AbstractContextManager[None]:
        """Inside, the weights are not exchanged by another thread."""
        return nullcontext()

    def set(self, value: Bits) -> Bits:
        """Switch to `value`, until the end of the block inside which that happens, and return the previous one.

        Raises:
            UnsupportedBitsError: bits without scales. Nothing is rounded to the nearest.
            UsageError: a plan that does not name the model's layers, a tensor that is not of integers, or another
                thread that is running the model at something else.
            PlanError: a Plan that was made for another checkpoint than `made_from`.
        """
        checked, previous = self.check(value), self.value

        def change(inside: bool) -> None:
            self.value = checked
            if not inside:
                self._base = checked

        self._uses.turn(here(checked, self._uses.arithmetic()), change)
        return previous

    def using(self, value: Bits | None = None, arithmetic: str | None = None) -> AbstractContextManager[None]:
        """Inside, the model runs at `value` and in `arithmetic`; where one is None, at what is set, and that stays.

        Raises as `set` does.
        """
        if not torch.compiler.is_compiling():
            return self._use(value, arithmetic)
        return nullcontext() if value is None else self._traced(value)

    @contextmanager
    def _use(self, value: Bits | None, arithmetic: str | None) -> Iterator[None]:
        use = here(self.value if value is None else self.check(value), arithmetic or self._uses.arithmetic())
        self._uses.enter(use, partial(self._become, use))
        try:
            yield
        finally:
            self._uses.leave(use, self._become)

    @contextmanager
    def _traced(self, value: Bits) -> Iterator[None]:
        """For a compiler: in its graph `value` is a constant, so no other thread can change it."""
        previous, self.value = self.value, self.check(value)
        try:
            yield
        finally:
            self.value = previous

    def __getstate__(self) -> dict[str, object]:
        """A copy is set to what runs now: nobody is inside a use of it."""
        return self.__dict__ | {"_base": self.value, "arithmetic": None, "_expanded": None}

    def _become(self, use: Use | None) -> None:
        self.value, self.arithmetic = (self._base, None) if use is None else (use.bits, use.arithmetic)

    def check(self, value: Bits) -> Bits:
        """`value`, if `set` would take it, a whole number of NumPy or torch as an int; raises as `set` does."""
        if isinstance(value, int) and not isinstance(value, bool):
            for known in self.supported:
                if value == known:
                    return known  # a constant: a compiler may hold `value` as a symbol
            raise UnsupportedBitsError(value, self.supported)
        if isinstance(value, Tensor) and (value.dim() or value.device.type != "cpu" or torch.compiler.is_compiling()):
            _check_integers(value)
            return value
        if isinstance(value, RowBits):
            for choice in value.choices:
                self.check(choice)
            return value
        if isinstance(value, Mapping):
            return self._check_plan(value)
        whole = whole_number(value)
        if whole is not None:
            return self.check(whole)
        if isinstance(value, Tensor):
            _check_integers(value)
        raise UsageError(
            f"bits must be an int, a plan (layer -> bits) or a tensor of integers, got {value!r}",
            hint=f"supported bits: {', '.join(map(str, self.supported))}",
        )

    def _check_plan(self, plan: Mapping[str, int]) -> Mapping[str, int]:
        if isinstance(plan, Plan) and plan.model is not None and self.made_from is not None:
            plan.model.check(self.made_from, f"the plan {plan.name}".strip())
        missing, unknown = self.layers.keys() - plan.keys(), plan.keys() - self.layers.keys()
        if missing or unknown:
            example = next(iter(sorted(missing or unknown)))
            raise UsageError(
                f"the plan does not fit this model: {len(missing)} layers missing, {len(unknown)} unknown "
                f"(for example {example})",
                hint="a plan gives bits for every quantized layer by name",
            )
        whole = {name: whole_number(bits) for name, bits in plan.items()}
        for name, bits in whole.items():
            if bits is None or bits not in self.layers[name]:
                raise UnsupportedBitsError(plan[name], self.layers[name], where=f"layer {name}")
        return plan if all(type(bits) is int for bits in plan.values()) else whole  # type: ignore[return-value]

    def of(self, layer: str) -> int | Tensor:
        """The bits of layer `layer`: an int, or the tensor of per-row bits."""
        if isinstance(self.value, (int, Tensor)):
            return self.value
        return self.value.of(layer) if isinstance(self.value, RowBits) else self.value[layer]

    def bits_for(self, layer: str, shape: torch.Size) -> int | Tensor:
        """The bits of layer `layer` for an input [*shape, K]: an int, or int8 [rows], the same for equal choices."""
        bits = self.of(layer)
        if not isinstance(bits, Tensor):
            return bits
        compiling = torch.compiler.is_compiling()
        known = None if compiling or bits.is_inference() else self.__dict__.get("_expanded")
        if known is not None and known[0] is bits and known[1:3] == (bits._version, shape):
            return known[3]
        rows = expand_rows(bits, shape)
        rows = rows if rows.dtype == torch.int8 else rows.long().clamp(-1, 127).to(torch.int8)
        if not compiling and not bits.is_inference():
            self._expanded = bits, bits._version, shape, rows
        return rows


class FixedBits:
    """In the place of a BitsState: a layer that always runs at `bits`, whatever its model is asked for.

    Args:
        model: the state of the model that the layer belongs to: its arithmetic holds for every layer.
    """

    def __init__(self, bits: int, model: BitsState | None = None) -> None:
        self.bits, self._model = bits, model

    @property
    def arithmetic(self) -> str | None:
        return None if self._model is None else self._model.arithmetic

    def of(self, layer: str) -> int:
        return self.bits

    def bits_for(self, layer: str, shape: torch.Size) -> int:
        return self.bits


def parse_bits(text: str | int | Iterable[int | str]) -> tuple[int, ...]:
    """Bits from what a user types: `3`, `2,4`, `2-4` or a mix; ascending, distinct, within 1..8.

    Raises UsageError for anything else.
    """
    values: list[int] = []
    whole = whole_number(text)
    try:
        parts = [whole] if whole is not None else text.split(",") if isinstance(text, str) else text
        for given in parts:  # type: ignore[union-attr]  # TypeError for what is no number, text or several
            whole = whole_number(given)
            part = str(given if whole is None else whole)
            low, dash, high = part.strip().partition("-")
            first, last = int(low), int(high if dash else low)
            if not 1 <= first <= last <= MAX_BITS:
                raise ValueError(part)
            values.extend(range(first, last + 1))
    except (TypeError, ValueError):
        values = []
    if not values:
        raise UsageError(
            f"bits {text!r} cannot be used", hint=f"give whole numbers from 1 to {MAX_BITS}: 3, 2,4 or 2-4"
        )
    return tuple(sorted(set(values)))


def expand_rows(row_bits: Tensor, shape: torch.Size) -> Tensor:
    """Per-row bits for an input [..., K] whose leading dimensions are `shape`: integer [rows].

    `row_bits` has one entry a row already (either of the two may be flattened), or one for each
    index of the first dimension(s). Raises UsageError if it fits neither way.
    """
    if row_bits.numel() == shape.numel() and (row_bits.dim() == 1 or len(shape) == 1):
        return row_bits.reshape(-1)
    if row_bits.shape == shape[: row_bits.dim()]:
        return row_bits.view(*row_bits.shape, *[1] * (len(shape) - row_bits.dim())).expand(shape).reshape(-1)
    raise UsageError(
        f"per-row bits of shape {list(row_bits.shape)} do not fit an input of {list(shape)} rows",
        hint="give one entry a sequence of the batch, or one a token",
    )


def _check_integers(rows: Tensor) -> None:
    if rows.dtype.is_floating_point or rows.dtype == torch.bool:
        raise UsageError(f"per-row bits must be an integer tensor, got {rows.dtype}")


def bits_state(model: nn.Module) -> BitsState:
    """The BitsState shared by the quantized layers of `model`.

    Raises UsageError if it has none, or several: of two models in one module it would be one that is switched.
    """
    found: dict[BitsState, str] = {}
    for name, module in model.named_modules():
        state = module.__dict__.get("bits_state")
        if isinstance(state, BitsState):
            found.setdefault(state, name)
    kind = type(model).__name__
    if not found:
        raise UsageError(f"{kind} has no quantized layers", hint="load one with bitstrata.load(OUT) after quantizing")
    if len(found) > 1:
        names = ", ".join(name or "itself" for name in found.values())
        raise UsageError(
            f"{kind} holds several quantized models, each with bits of its own: {names}",
            hint="name the one that is meant: use_bits(module.<name>, bits)",
        )
    return next(iter(found))


@contextmanager
def use_bits(model: nn.Module, bits: Bits) -> Iterator[None]:
    """Run `model` at `bits` inside the block; what was set before comes back, exceptions included.

    Raises as `BitsState.set` and `bits_state` do.
    """
    with bits_state(model).using(bits):
        yield
