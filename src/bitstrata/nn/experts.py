"""Experts: the feed-forward layers of a mixture, each token through those that its router chose.

    y[t] = sum over the chosen e of  score[t, e] * down_e( act( gate_e(x[t]) ) * up_e(x[t]) )

`Experts` stands in the place of the module that transformers calls with tokens, chosen experts and scores. Its linears
are modules of their own, `<expert>.gate_proj` and so on, so that what is said of a linear is said of an expert's: its
bits, its name in a plan, its pages. Tokens are sorted by expert, and each expert that has some runs once on all of
them; the others' weights are not read. What is between the linears (activation, limits, a norm) is the original's.

A checkpoint stores each projection of all experts as one set of tensors, experts first (FORMAT.md). `StoredExperts`
holds them while they are loaded; `open` makes the linears, and a state dict has them merged again.

Sorting looks at the router's choice, for which a GPU waits, and which a compiler cannot trace through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import is_plain, linear_many
from ..planes.pack import words_per_row
from ..planes.weights import PlaneWeight, make_scales, scales_shapes
from .bits import BitsState
from .linear import PlaneLinear
from .stored import PlaneModule


class StoredExperts(nn.Module):
    """One projection of all experts as a checkpoint has it: plane_<i> int32 [E, N, ceil(K/32)], scales alike.

    Args:
        name: the layer's name in the checkpoint; names: of its experts; share: of tokens that an expert
            gets, on average.
        bits: for which there will be planes and scales; none for pages that come later.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        name: str,
        names: Sequence[str],
        share: float,
        state: BitsState,
        bits: tuple[int, ...],
        group_size: int,
        kind: str,
        bias: bool,
        paged: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group_size, self.kind = in_features, out_features, group_size, kind
        self.name, self.names, self.bits_state, self.paged = name, tuple(names), state, paged
        self.share = share
        self.bits = () if paged else bits
        count = len(self.names)
        plane = (count, out_features, words_per_row(in_features))
        for index in range(max(self.bits, default=0)):
            self.register_buffer(f"plane_{index}", torch.zeros(plane, dtype=torch.int32, device=device))
        for value in self.bits:
            for key, (stored_as, shape) in self._shapes(value).items():
                self.register_buffer(key, torch.zeros((count, *shape), dtype=stored_as, device=device))
        self.register_buffer("weight", torch.empty(0, dtype=dtype, device=device))
        self.bias = (
            nn.Parameter(torch.zeros(count, out_features, dtype=dtype, device=device), requires_grad=False)
            if bias
            else None
        )

    def _shapes(self, bits: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return scales_shapes(self.kind, bits, self.out_features, self.in_features, self.group_size)

    def linear(self, expert: int) -> PlaneLinear:
        """One expert's linear; its tensors are parts of these."""
        weight = self.get_buffer("weight")
        linear = PlaneLinear(
            self.in_features,
            self.out_features,
            name=self.names[expert],
            state=self.bits_state,
            bits=(),
            group_size=self.group_size,
            kind=self.kind,
            paged=self.paged,
            bias=self.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        linear.share = self.share
        if self.bias is not None and linear.bias is not None:
            linear.bias.data = self.bias.data[expert].clone()
        if self.bits:
            planes = tuple(self.get_buffer(f"plane_{index}")[expert] for index in range(max(self.bits)))
            scales = {
                bits: make_scales(self.kind, bits, {key: self.get_buffer(key)[expert] for key in self._shapes(bits)})
                for bits in self.bits
            }
            linear.hold(PlaneWeight(planes, scales, self.in_features, self.group_size))
        return linear


class Experts(nn.Module):
    """What `original`, a module of transformers, computes, with linears for its merged matrices.

    Args:
        original: gives all that is not a matrix; it is not used any more.
        count: how many experts there are.
        gated: whether there is a gate_proj beside up_proj and down_proj.
        activation: what the original makes of gate and up [n, 2I]; None for act_fn(gate) * up, or act_fn(up).
        interleaved: whether that takes gate and up in turns, and not one after the other.
        presorted: whether the module is called with the inputs of each expert alone, [E x T, H], scores in them; those
            that an expert does not get are 0.
        merged: names of the original's merged parameters.
    """

    def __init__(
        self,
        original: nn.Module,
        *,
        count: int,
        gated: bool,
        activation: Callable[[nn.Module, Tensor], Tensor] | None,
        interleaved: bool,
        presorted: bool,
        merged: Sequence[str],
    ) -> None:
        super().__init__()
        held = {key: value for key, value in original.__dict__.items() if key not in self.__dict__}
        self.__dict__.update(held)
        for kind in ("_parameters", "_buffers", "_modules"):
            own: dict[str, Any] = self.__dict__[kind]
            own.update({key: value for key, value in getattr(original, kind).items() if key not in merged})
        self.train(original.training)
        self.expert_count, self.projections = count, ("gate_proj", "up_proj", "down_proj")[not gated :]
        self._interleaved, self._activation, self._presorted = interleaved, activation, presorted
        self.register_state_dict_post_hook(_merge_experts)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_split_experts)  # type: ignore[no-untyped-call]

    def set_linears(self, linears: Mapping[str, Sequence[nn.Module]]) -> None:
        """Projection -> a linear for each expert."""
        for expert in range(self.expert_count):
            child = nn.Module()
            for name in self.projections:
                child.add_module(name, linears[name][expert])
            self.add_module(str(expert), child)

    def open(self) -> None:
        """Make linears of the stored experts, if there are any."""
        stored = {name: module for name, module in self._modules.items() if isinstance(module, StoredExperts)}
        if stored:
            for name in stored:
                del self._modules[name]
            self.set_linears(
                {
                    name: [module.linear(expert) for expert in range(self.expert_count)]
                    for name, module in stored.items()
                }
            )

    def forward(self, hidden_states: Tensor, *routing: Tensor) -> Tensor:
        """Tokens [..., H], and of each the chosen experts and their scores, [T, k] both -> [..., H]."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self._presorted:
            return self._on_presorted(x)
        chosen, scores = routing
        tokens, k = chosen.shape
        if tokens == 1:
            y = self._on_one(x, chosen[0].tolist(), scores[0])
            if y is not None:
                return y.to(hidden_states.dtype).view(*hidden_states.shape[:-1], -1)
        order = chosen.reshape(-1).argsort(stable=True)
        counts = chosen.reshape(-1).bincount(minlength=self.expert_count).tolist()
        least = self._least_rows(tokens, x.dtype)
        parts, start = [], 0
        for expert, count in enumerate(counts[: self.expert_count]):
            if count:
                parts.append(self._run(expert, x, order[start : start + count] // k, tokens, least))
                start += count
        if not parts:
            return torch.zeros_like(hidden_states)
        sorted_rows = torch.cat(parts)  # [T * k, H]
        y = torch.zeros_like(sorted_rows).index_copy(0, order[:start], sorted_rows)
        y = (y * scores.reshape(-1, 1)).view(tokens, k, -1).sum(1)
        return y.to(hidden_states.dtype).view(*hidden_states.shape[:-1], -1)

    def _on_one(self, x: Tensor, chosen: Sequence[int], scores: Tensor) -> Tensor | None:
        """One token through its experts: all that read it in one call. None where a module has to be called as such."""
        projections: list[list[Any]] = [
            [self._modules[str(expert)]._modules[name] for expert in chosen]  # type: ignore[union-attr]
            for name in self.projections
        ]
        every = [linear for linears in projections for linear in linears]
        if not is_plain(x, scores) or not all(type(linear) is PlaneLinear and linear.is_bare for linear in every):
            return None
        one = torch.Size([1])
        bits = [[linear.bits_state.bits_for(linear.name, one, x.device) for linear in of] for of in projections]
        if any(isinstance(value, Tensor) for of in bits for value in of):
            return None
        arithmetic = every[0].bits_state.arithmetic
        outputs: list[list[Tensor]] = []
        into = [linear for linears in projections[:-1] for linear in linears]
        at = [value for of in bits[:-1] for value in of]
        y: dict[int, Tensor] = {}
        for value in set(at):
            same = [index for index, other in enumerate(at) if other == value]
            found = linear_many(x, [into[index].packed for index in same], value, arithmetic)
            y.update(zip(same, found, strict=True))
        for start in range(0, len(into), len(chosen)):
            outputs.append([into[index].with_bias(y[index]) for index in range(start, start + len(chosen))])
        inner = [self.between(*rows) for rows in zip(*outputs, strict=True)]  # a row may round apart from several
        downs = zip(projections[-1], bits[-1], inner, strict=True)
        rows = torch.cat([down.with_bias(down.packed.linear(row, value, arithmetic)) for down, value, row in downs])
        if getattr(self, "has_post_expert_norm", False):
            rows = self.get_submodule("post_expert_norm")(rows)
        return (rows * scores.reshape(-1, 1)).view(1, len(chosen), -1).sum(1)

    def tokens_of(self, hidden_states: Tensor, *routing: Tensor) -> Tensor:
        """How many tokens each expert gets in a call with these arguments: int64 [E]."""
        if self._presorted:
            return hidden_states.reshape(self.expert_count, -1, hidden_states.shape[-1]).any(-1).sum(1)
        return routing[0].reshape(-1).bincount(minlength=self.expert_count)[: self.expert_count]

    def _on_presorted(self, x: Tensor) -> Tensor:
        each = x.view(self.expert_count, -1, x.shape[-1])  # [E, T, H]
        least = self._least_rows(each.shape[1], x.dtype)
        parts = []
        for expert, inputs in enumerate(each):
            y = torch.zeros_like(inputs)
            mine = inputs.any(-1).nonzero()[:, 0]
            if len(mine):
                y = y.index_copy(0, mine, self._run(expert, inputs, mine, len(inputs), least).to(y.dtype))
            parts.append(y)
        return torch.cat(parts)

    def _least_rows(self, tokens: int, dtype: torch.dtype) -> int:
        """With how few rows an expert may run in a call of so many tokens.

        A kernel may round calls of few rows in another way than longer ones. A token of a long call must not notice how
        many others chose its expert, so each expert's run is long there; rows that are one too many repeat the first.
        """
        first = next(iter(self._modules["0"]._modules.values()))  # type: ignore[union-attr]
        if not isinstance(first, PlaneLinear) or not first.bits:
            return 0
        steady = first.packed.kernel_for(1, dtype).steady(dtype)
        return 0 if steady is None or tokens <= steady else steady + 1

    def _run(self, expert: int, x: Tensor, rows: Tensor, tokens: int, least: int) -> Tensor:
        """One expert on rows `rows` of x, of so many tokens, at least `least` at a time: [n, H]."""
        child = self._modules[str(expert)]
        assert child is not None
        linears = [child._modules[name] for name in self.projections]
        bits: list[Any] = [
            linear.bits_state.bits_for(linear.name, torch.Size([tokens]), x.device)
            if isinstance(linear, PlaneLinear)
            else None
            for linear in linears
        ]
        if not any(isinstance(value, Tensor) for value in bits):
            return self._at(linears, [{}] * len(bits), x, rows, least)
        each = [value[rows] if isinstance(value, Tensor) else value for value in bits]
        if not least:
            return self._at(linears, [{"bits": value} for value in each], x, rows, 0)
        columns = [value if isinstance(value, Tensor) else torch.full_like(rows, value) for value in each]
        choices, which = torch.stack([column.long() for column in columns]).unique(dim=1, return_inverse=True)
        parts, places = [], []
        for index, choice in enumerate(choices.T.tolist()):
            mine = (which == index).nonzero()[:, 0]
            parts.append(self._at(linears, [{"bits": value} for value in choice], x, rows[mine], least))
            places.append(mine)
        y = torch.cat(parts)
        return torch.zeros_like(y).index_copy(0, torch.cat(places), y)

    def _at(
        self, linears: Sequence[Any], told: Sequence[dict[str, Any]], x: Tensor, rows: Tensor, least: int
    ) -> Tensor:
        """Linears, each called with what it is told, on these rows of x."""
        count = len(rows)
        x = x[rows if count >= least else torch.cat([rows, rows[:1].expand(least - count)])]
        *into, down = (partial(linear, **its) for linear, its in zip(linears, told, strict=True))
        y: Tensor = down(self.between(*(linear(x) for linear in into)))[:count]
        if getattr(self, "has_post_expert_norm", False):
            y = self.get_submodule("post_expert_norm")(y)
        return y

    def between(self, *outputs: Tensor) -> Tensor:
        """What down_proj reads where gate_proj and up_proj, or up_proj alone, gave this."""
        if len(outputs) == 2 and self._activation is not None:
            joined = torch.stack(outputs, -1).flatten(-2) if self._interleaved else torch.cat(outputs, -1)
            return self._activation(self, joined)
        act: Any = getattr(self, "act_fn", None)
        inner: Tensor = act(outputs[0]) * outputs[1] if len(outputs) == 2 else act(outputs[0])
        return inner


def _merged_names(module: Experts, state: Mapping[str, Any], prefix: str, name: str) -> list[str]:
    """What one expert's projection has in a state dict: the ends of the names."""
    first = f"{prefix}0.{name}."
    return [key.removeprefix(first) for key in state if key.startswith(first)]


def _merge_experts(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """In a state dict planes are as in a checkpoint: of all experts in one tensor."""
    assert isinstance(module, Experts)
    first = module._modules.get("0")
    if first is None or not isinstance(getattr(first, "down_proj", None), PlaneModule):
        return
    for name in module.projections:
        for end in _merged_names(module, state, prefix, name):
            keys = [f"{prefix}{expert}.{name}.{end}" for expert in range(module.expert_count)]
            if all(key in state for key in keys):  # experts at the bits of one plan may differ
                parts = [state.pop(key) for key in keys]
                state[f"{prefix}{name}.{end}"] = parts[0] if end == "weight" else torch.stack(parts)


def _split_experts(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """The opposite, for a state dict that is loaded."""
    assert isinstance(module, Experts)
    if "0" not in module._modules:
        return
    for name in module.projections:
        first = f"{prefix}{name}."
        for key in [key for key in state if key.startswith(first)]:
            value, end = state.pop(key), key.removeprefix(first)
            for expert in range(module.expert_count):
                state[f"{prefix}{expert}.{name}.{end}"] = value if end == "weight" else value[expert]
