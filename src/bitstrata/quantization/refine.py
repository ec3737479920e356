"""End-to-end tuning of scales and offsets, planes frozen: the whole model at p bits imitates the original.

    minimise over a^p, z^p   mean over tokens  KL( original(x) || model_p(x) )      for each p on its own

No precision touches another's coefficients, so nesting stays exact (the idea of EfficientQAT's
second stage, arXiv 2407.11062, with the original's distribution as the target). Adam, a short warm-up,
cosine to 0. A coefficient moves in units of its layer's last scale, the distance between
neighbouring weights, so one learning rate serves all layers and all bits.

Masters are fp32; the model computes with coefficients rounded as they are stored. Some calibration windows are
held out: the coefficients with the least divergence there are kept, the start among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..planes import PlaneWeight
from ..planes.pack import unpack_bits
from ..planes.weights import ByteScales, Codebook
from .grouping import Grouping, make_affine
from .method import Tuning
from .reconstruct import LayerState
from .tracks import rounded

TOKENS_AT_ONCE = 2048  # of logits held
LOOKS = 8  # how often the held-out windows are measured


class _Student:
    """One precision's coefficients: what they are, what is trained, and the best so far."""

    def __init__(
        self, layers: Mapping[str, PlaneWeight], bits: int, planes: Mapping[str, tuple[Grouping, Tensor]]
    ) -> None:
        self.bits = bits
        self.start: dict[str, tuple[Tensor, Tensor]] = {}
        self.delta: dict[str, tuple[Tensor, Tensor]] = {}
        self.unit: dict[str, Tensor] = {}
        self.bytes: dict[str, Tensor] = {}  # units of the coefficients that are stored as bytes, one a group
        self.planes = planes
        for name, weight in layers.items():
            scales = weight.scales[bits]
            assert not isinstance(scales, Codebook)
            grouping, device = planes[name][0], planes[name][1].device
            fp16 = scales.affine()
            scale = fp16.scale.to(device).float().reshape(bits, -1)
            offset = fp16.offset.to(device).float().reshape(-1)
            if isinstance(scales, ByteScales):
                self.bytes[name] = scales.unit.to(device).repeat_interleave(grouping.groups)
            self.start[name] = scale, offset
            self.unit[name] = scale[-1].square().mean().sqrt().clamp_min(1e-12)
            self.delta[name] = torch.zeros_like(scale).requires_grad_(), torch.zeros_like(offset).requires_grad_()
        self.best_loss = math.inf
        self.first_loss = math.inf
        self.best: dict[str, tuple[Tensor, Tensor]] = {}

    def parameters(self) -> list[Tensor]:
        return [part for parts in self.delta.values() for part in parts]

    def coefficients(self, name: str) -> tuple[Tensor, Tensor]:
        """As they are stored; gradients pass the rounding as if it were not there."""
        (scale, offset), (by_scale, by_offset), unit = self.start[name], self.delta[name], self.unit[name]
        exact = torch.cat([scale + unit * by_scale, (offset + unit * by_offset).unsqueeze(0)])
        with torch.no_grad():
            moved = rounded(exact, self.bytes.get(name)) - exact
        stored = exact + moved
        return stored[:-1], stored[-1]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Dense weights [N, K], from coefficients as they are stored."""
        for name, (grouping, planes) in self.planes.items():
            yield name, LayerState(grouping, planes[: self.bits], *self.coefficients(name)).trained()

    def keep(self, loss: float) -> None:
        """Note the held-out loss of the current coefficients, and the coefficients if there are none better."""
        if not self.best:
            self.first_loss = loss
        if not self.best or loss < self.best_loss:
            self.best_loss = loss
            self.best = {name: tuple(v.detach().clone() for v in self.coefficients(name)) for name in self.planes}  # type: ignore[misc]


@dataclass(frozen=True)
class Refined:
    """layers: with tuned coefficients; divergence: bits -> held-out KL before and after."""

    layers: dict[str, PlaneWeight]
    divergence: dict[int, tuple[float, float]]


def refine(
    model: nn.Module,
    layers: Mapping[str, PlaneWeight],
    transposed: frozenset[str],
    fixed: Mapping[str, Tensor],
    windows: Tensor,
    tuning: Tuning,
    generator: torch.Generator,
    step_done: Callable[[], None] = lambda: None,
) -> Refined:
    """Tune the scales of `layers` at every bits.

    Args:
        model: the original, whole, fp32, in memory.
        layers: name -> what was found for it; affine scales.
        transposed: names whose parameter holds W^T.
        fixed: parameter name -> what else is quantized, at every bits alike.
        windows: int64 [n, S], at least two; the last ones are held out.
        step_done: called after every step.
    """
    device = next(model.parameters()).device
    planes = {name: _unpacked(weight, device) for name, weight in layers.items()}
    bits = sorted({value for weight in layers.values() for value in weight.bits})
    constant = {name: weight.to(device) for name, weight in fixed.items()}
    students = [_Student(layers, value, planes) for value in bits]
    held = max(1, min(16, len(windows) // 8))
    training, checking = windows[:-held], windows[-held:]
    batch = max(1, tuning.batch_tokens // windows.shape[1])

    def outputs(student: _Student, tokens: Tensor) -> Tensor:
        replaced = dict(constant)
        replaced |= {
            f"{name}.weight": (weight.T if name in transposed else weight) for name, weight in student.weights()
        }
        # a quantized head that is tied has both its names in `fixed`
        return _logits(
            functional_call(model, replaced, (), {"input_ids": tokens, "use_cache": False}, tie_weights=False)
        )

    def divergence(student: _Student) -> float:
        total = 0.0
        with torch.no_grad():
            for part in checking.split(max(1, TOKENS_AT_ONCE // windows.shape[1])):
                tokens = part.to(device)
                total += float(_kl(_logits(model(input_ids=tokens, use_cache=False)), outputs(student, tokens)))
        return total / checking.numel()

    optimizer = torch.optim.Adam(
        [p for s in students for p in s.parameters()], lr=tuning.learning_rate, betas=(0.9, 0.99)
    )
    for student in students:
        student.keep(divergence(student))
    order = torch.empty(0, dtype=torch.int64)
    for step in range(tuning.steps):
        warm = min(1.0, (step + 1) / max(1.0, 0.05 * tuning.steps))
        for group in optimizer.param_groups:
            group["lr"] = tuning.learning_rate * warm * (1 + math.cos(math.pi * step / tuning.steps)) / 2
        if not len(order):
            order = torch.randperm(len(training), generator=generator)
        chosen, order = order[:batch], order[batch:]
        tokens = training[chosen].to(device)
        with torch.no_grad():
            target = _logits(model(input_ids=tokens, use_cache=False))
        optimizer.zero_grad(set_to_none=True)
        for student in students:  # one after the other, so that one graph is in memory at a time
            (_kl(target, outputs(student, tokens)) / tokens.numel()).backward()
        optimizer.step()
        if (step + 1) % max(1, tuning.steps // LOOKS) == 0 or step + 1 == tuning.steps:
            for student in students:
                student.keep(divergence(student))
        step_done()
    return Refined(
        {name: _with(weight, students, name) for name, weight in layers.items()},
        {student.bits: (student.first_loss, student.best_loss) for student in students},
    )


def _unpacked(weight: PlaneWeight, device: torch.device) -> tuple[Grouping, Tensor]:
    grouping = Grouping(weight.out_features, weight.in_features, weight.group_size)
    planes = [grouping.split(unpack_bits(plane, weight.in_features).to(torch.int8) * 2 - 1) for plane in weight.planes]
    return grouping, torch.stack(planes).to(device)


def _with(weight: PlaneWeight, students: list[_Student], name: str) -> PlaneWeight:
    scales = dict(weight.scales)
    for student in students:
        old = scales[student.bits]
        assert not isinstance(old, Codebook)
        scale, offset = (value.cpu() for value in student.best[name])
        unit = old.unit if isinstance(old, ByteScales) else None
        scales[student.bits] = make_affine(scale.reshape(old.scale.shape), offset.reshape(old.offset.shape), unit)
    return PlaneWeight(weight.planes, scales, weight.in_features, weight.group_size)


def _logits(output: object) -> Tensor:
    logits = output.logits  # type: ignore[attr-defined]
    assert isinstance(logits, Tensor)
    return logits.float()


def _kl(target: Tensor, found: Tensor) -> Tensor:
    """KL(target || found) summed over tokens; logits [b, S, vocabulary]."""
    reference = target.log_softmax(-1)
    return (reference.exp() * (reference - found.log_softmax(-1))).sum()
