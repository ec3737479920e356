"""How bits travel from a model's caller to its layers.

A caller gives an int (uniform bits), a plan (layer name -> bits), a list with one of these a sequence, or a tensor of
integers, one a sequence or token. It is checked and resolved once into an `Assignment`, from which each layer takes its
entry. All quantized layers of one model share one `BitsState`, which holds the assignment that runs now. Without bits
each layer runs at the highest that it holds, so a model with all planes, one with the pages of one plan, and an output
head with one precision are the same case.

There is no module-level state: two models never affect each other. Switching copies no weights. Threads that run one
model at the same time must agree (uses.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedBitsError, UsageError
from ..planes.weights import whole_number
from .uses import Use, Uses

BitsOrPlan = int | Mapping[str, int]  # of one sequence
Choice = tuple[int, ...]  # the bits of every layer of one model, in the order of its state


class Assignment:
    """What a model runs at: checked, and in the form that layers look up.

    Args:
        given: what was asked for; the default where nothing was.
        choices: the distinct choices of the rows.
        rows: None where every row runs at choices[0]. Else the index of each row's choice, int64, or without choices
            its bits, integers; [rows], [batch] or [batch, sequence].
    """

    def __init__(self, given: Any, choices: tuple[Choice, ...], rows: Tensor | None = None) -> None:
        self.given, self.choices, self.rows = given, choices, rows
        # of each layer, its bits in each choice
        self._columns: tuple[Choice, ...] = () if rows is None else tuple(zip(*choices, strict=True))
        # (bits of a layer in each choice, rows of its input, device) -> bits a row. A graph's tensor may change between
        # two passes, so there results are kept for one pass only, see `for_tokens`.
        changes = rows is not None and not choices and rows.device.type != "cpu"
        self._expanded: dict[tuple[Choice, torch.Size, torch.device | None], Tensor] | None = None if changes else {}

    def agrees(self, other: Assignment) -> bool:
        """Whether both surely mean the same."""
        return self is other or (self.rows is None and other.rows is None and self.choices == other.choices)

    def for_tokens(self, tokens: Tensor | None) -> Assignment:
        """For one pass over `tokens` [batch, sequence, ...]: one entry a token, on their device.

        Some models flatten tokens before a layer, and generation repeats each sequence in place (beams, several
        returns). Raises UsageError for a number of rows that does not fit.
        """
        if self.rows is None:
            return self
        rows = self.rows
        if tokens is not None:
            shape, count = tokens.shape[:2], rows.numel()
            if rows.dim() == 1 and count not in (0, shape[0], shape.numel()) and shape[0] % count == 0:
                rows = rows.repeat_interleave(shape[0] // count)
            rows = expand_rows(rows.to(tokens.device), shape)
        fitted = Assignment(self.given, self.choices, rows)
        fitted._expanded = {}
        return fitted

    def at(self, place: int, shape: torch.Size, device: torch.device | None) -> int | Tensor:
        """Layer `place` on an input of `shape` rows: an int where all choices agree, else int8 [rows]."""
        bits = self._columns[place] if self._columns else ()
        if bits and bits.count(bits[0]) == len(bits):
            return bits[0]
        if self._expanded is None or torch.compiler.is_compiling():
            return self._expand(bits, shape, device)
        key = bits, shape, device
        found = self._expanded.get(key)
        if found is None:
            found = self._expanded[key] = self._expand(bits, shape, device)
        return found

    def _expand(self, bits: Choice, shape: torch.Size, device: torch.device | None) -> Tensor:
        assert self.rows is not None
        rows = self.rows if device is None else self.rows.to(device)
        if bits:
            rows = torch.tensor(bits, dtype=torch.int8, device=rows.device)[rows]
        return expand_rows(rows.to(torch.int8), shape)


Bits = BitsOrPlan | Sequence[BitsOrPlan] | Tensor | Assignment


class BitsState:
    """The bits that the quantized layers of one model hold, and those that they run at now.

    Args:
        layers: for each layer that follows what is asked for, the bits that it holds; a plan names exactly these.
        fixed: of layers that always run at one precision, such as an output head, that precision.
        plan: of a model that holds one plan's pages only, that plan. It runs nothing else.

    supported: bits at which every layer can run.
    made_from: the checkpoint, if it is known; plans are checked against it.
    arithmetic: that every layer computes in, "exact" or "int8"; None for what the kernel that runs does.
    version: changes when the layers hold other weights.
    """

    version = 0
    made_from: object | None = None
    arithmetic: str | None = None

    def __init__(
        self,
        layers: Mapping[str, tuple[int, ...]] | None = None,
        *,
        fixed: Mapping[str, int] | None = None,
        plan: Mapping[str, int] | None = None,
    ) -> None:
        self._fixed = dict(fixed or {})
        self._uses = Uses()
        self._default = Assignment(0, ())
        self._base = self._now = self._default  # what runs outside of every use; and now
        self._hold(layers or {}, plan)

    def _hold(self, layers: Mapping[str, tuple[int, ...]], plan: Mapping[str, int] | None) -> None:
        self.layers, self.plan = dict(layers), plan
        self.version += 1
        self.supported = tuple(sorted(set.intersection(*map(set, layers.values())) if layers else ()))
        self._places = {name: place for place, name in enumerate([*self.layers, *self._fixed])}
        fixed = tuple(self._fixed.values())
        cap = max(self.supported, default=0)
        highest = (max((bits for bits in held if not cap or bits <= cap), default=0) for held in layers.values())
        # changed in place: whoever runs at it goes along with a resize
        self._default.given = cap if plan is None else plan
        self._default.choices = ((*highest, *fixed),)
        self._uniform = {bits: Assignment(bits, ((bits,) * len(layers) + fixed,)) for bits in self.supported}

    def bits_for(self, layer: str, shape: torch.Size, device: torch.device | None = None) -> int | Tensor:
        """At what `layer` runs now: an int, or for an input of `shape` rows on `device` one value a row, int8 [rows].

        Within one forward pass the same rows are the same tensor.
        """
        now, place = self._now, self._places[layer]
        if now.rows is None:
            return now.choices[0][place]
        if not now.choices and place >= len(self.layers):
            return self._fixed[layer]
        return now.at(place, shape, device)

    def of(self, choice: Choice, layer: str) -> int:
        """The bits of `layer` in one choice of an assignment."""
        return choice[self._places[layer]]

    @property
    def default(self) -> BitsOrPlan:
        """What runs where no bits are given: the highest supported, or the plan in memory."""
        given: BitsOrPlan = self._default.given
        return given

    @property
    def value(self) -> Any:
        """What runs now, as it was asked for. Setting it lasts until the end of the block inside which that happens.

        None is the default. Setting raises UnsupportedBitsError for bits that are not there (nothing is rounded),
        PlanError for a plan of another checkpoint, UsageError for anything else that is no bits of this model, and
        while another thread is running the model at something else.
        """
        return self._now.given

    @value.setter
    def value(self, value: Bits | None) -> None:
        with self._uses.lock:
            mine = self._uses.innermost()
            assignment = self.resolve(value)
            self._uses.require_agreement(Use(assignment, None if mine is None else mine.arithmetic))
            self._now = assignment
            if mine is None:
                self._base = assignment
            else:
                mine.assignment = assignment

    def using(self, value: Bits | None = None, arithmetic: str | None = None) -> AbstractContextManager[None]:
        """Inside, the model runs at `value` and in `arithmetic`; where one is None, at what is set.

        Raises as setting `value`.
        """
        if torch.compiler.is_compiling():
            return nullcontext() if value is None else self._traced(self.resolve(value))
        return self._use(value, arithmetic, None, is_step=False)

    def step(self, value: Bits | None = None, tokens: Tensor | None = None) -> AbstractContextManager[None]:
        """`using` for one forward pass on `tokens` [batch, sequence, ...], during which no weight is exchanged."""
        if torch.compiler.is_compiling():
            return self._traced((self._now if value is None else self.resolve(value)).for_tokens(tokens))
        return self._use(value, None, tokens, is_step=True)

    @contextmanager
    def _use(self, value: Bits | None, arithmetic: str | None, tokens: Tensor | None, is_step: bool) -> Iterator[None]:
        uses = self._uses
        with uses.lock:
            mine = uses.innermost()
            if is_step:
                uses.wait_for_change()
            assignment = self._now if value is None else self.resolve(value)
            if is_step and not (value is None and mine is not None and mine.is_step):  # else it is fitted already
                assignment = assignment.for_tokens(tokens)
            use = Use(assignment, arithmetic or (mine.arithmetic if mine is not None else None), is_step)
            uses.enter(use)
            self._become(use)
        try:
            yield
        finally:
            with uses.lock:
                self._become(uses.leave(use))

    def _become(self, use: Use | None) -> None:
        self._now, self.arithmetic = (self._base, None) if use is None else (use.assignment, use.arithmetic)

    @contextmanager
    def _traced(self, assignment: Assignment) -> Iterator[None]:
        """For a compiler: in its graph `assignment` is a constant, so no other thread can change it."""
        previous, self._now = self._now, assignment
        try:
            yield
        finally:
            self._now = previous

    def check_outside(self) -> None:
        """Raise UsageError where the caller is inside a step of this model, which a change of weights waits for."""
        self._uses.check_outside()

    @contextmanager
    def changing(self, plan: Mapping[str, int]) -> Iterator[None]:
        """Inside, no step is under way; afterwards the model holds the pages of `plan`, which names every layer.

        Raises UsageError where the caller itself is inside a step.
        """
        with self._uses.changing():
            yield
            with self._uses.lock:
                self._hold({name: (plan[name],) for name in self.layers}, plan)

    def __getstate__(self) -> dict[str, object]:
        """A copy is set to what runs now: nobody is inside a use of it."""
        return self.__dict__ | {"_base": self._now, "arithmetic": None}

    def resolve(self, value: Bits | None) -> Assignment:
        """`value`, checked; raises as setting `value` does. None is the default.

        Of a model that holds one plan's pages everything that it can run is its default, and goes along with a resize.
        """
        if value is None or isinstance(value, Assignment):
            return self._default if value is None else value
        if isinstance(value, Tensor) and (value.dim() or value.device.type != "cpu" or torch.compiler.is_compiling()):
            return self._resolve_rows(value)
        if isinstance(value, (list, tuple)) and value:
            found = _of_rows([self._resolve_one(entry) for entry in value], [1] * len(value))
        else:
            found = self._resolve_one(value)
        return found if self.plan is None else self._default

    def _resolve_one(self, value: Any) -> Assignment:
        """An int or a plan."""
        if isinstance(value, Mapping):
            return self._resolve_plan(value)
        whole = value if isinstance(value, int) and not isinstance(value, bool) else whole_number(value)
        for known in self.supported if whole is not None else ():
            if whole == known:  # a compiler may hold `value` as a symbol
                return self._uniform[known]
        if whole is not None:
            raise self._unsupported(whole)
        if isinstance(value, Tensor):
            _check_integers(value)
        raise UsageError(
            "bits must be an int, a plan (layer -> bits), a list with one of these a sequence, "
            f"or a tensor of integers, got {value!r}",
            hint=f"supported bits: {', '.join(map(str, self.supported))}",
        )

    def _resolve_rows(self, rows: Tensor) -> Assignment:
        _check_integers(rows)
        # elsewhere looking would wait for the device
        if rows.device.type == "cpu" and not torch.compiler.is_compiling():
            rows = rows.clone()  # what was checked stays as it is
            for bits in sorted(set(rows.flatten().tolist()) - set(self.supported)):
                raise self._unsupported(bits)
            if self.plan is not None:
                return self._default
        return Assignment(rows, (), rows)

    def _resolve_plan(self, plan: Mapping[str, int]) -> Assignment:
        check = getattr(plan, "check_made_for", None)
        if check is not None and self.made_from is not None:
            check(self.made_from)
        missing, unknown = self.layers.keys() - plan.keys(), plan.keys() - self.layers.keys()
        if missing or unknown:
            example = next(iter(sorted(missing or unknown)))
            raise UsageError(
                f"the plan does not fit this model: {len(missing)} layers missing, {len(unknown)} unknown "
                f"(for example {example})",
                hint="a plan gives bits for every quantized layer by name",
            )
        choice = []
        for name, held in self.layers.items():
            bits = whole_number(plan[name])
            if bits is not None and bits in held:
                choice.append(bits)
            elif self.plan is None:
                raise UnsupportedBitsError(plan[name], held, where=f"layer {name}")
            else:
                raise UsageError(
                    f"the plan {getattr(plan, 'name', '')} is not the one in memory".replace("  ", " "),
                    hint="model.resize(plan) reads and drops what differs; "
                    "without `bits` the model runs what is in memory",
                )
        return Assignment(plan, ((*choice, *self._fixed.values()),))

    def _unsupported(self, asked: int) -> UnsupportedBitsError:
        if self.plan is None:
            return UnsupportedBitsError(asked, self.supported)
        bits = sorted(set(self.plan.values()))
        held = f"{bits[0]} bits a layer" if len(bits) == 1 else f"a plan of {bits[0]} to {bits[-1]} bits a layer"
        error = UnsupportedBitsError(asked, bits, where=f"this model: in memory is {held} and nothing else")
        error.hint = f"leave bits out to run what is in memory, or call model.resize({asked})"
        return error


def together(assignments: Sequence[Assignment], lengths: Sequence[int]) -> Assignment:
    """One assignment for a batch in which lengths[i] rows run at assignments[i], each of them uniform over its rows.

    One choice for all is no tensor, and kernels have less to do.
    """
    first = assignments[0]
    if all(assignment.choices == first.choices for assignment in assignments):
        return first
    return _of_rows(assignments, lengths)


def _of_rows(assignments: Sequence[Assignment], lengths: Sequence[int]) -> Assignment:
    places: dict[Choice, int] = {}
    rows: list[int] = []
    for assignment, length in zip(assignments, lengths, strict=True):
        rows += [places.setdefault(assignment.choices[0], len(places))] * length
    return Assignment([assignment.given for assignment in assignments], tuple(places), torch.tensor(rows))


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
        if isinstance(state, BitsState) and state.layers:
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

    bits: an int, a plan, a list with one of these a sequence, or a tensor of integers, one a sequence or token.

    Raises as setting `BitsState.value` and `bits_state` do.
    """
    with bits_state(model).using(bits):
        yield
