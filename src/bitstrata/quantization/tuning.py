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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..planes import PlaneWeight
from ..planes.pack import unpack_bits
from ..planes.weights import ByteScales, Codebook
from ..solvers import Tuning
from ..solvers.grouping import Grouping, make_affine
from ..solvers.joint import rounded
from ..solvers.reconstruct import batches, cosine, dense, set_rate

TOKENS_AT_ONCE = 2048  # of logits held
LOOKS = 8  # how often the held-out windows are measured


@dataclass(frozen=True)
class Tuned:
    """layers: with tuned coefficients; divergence: bits -> held-out KL before and after."""

    layers: dict[str, PlaneWeight]
    divergence: dict[int, tuple[float, float]]


def tune(
    model: nn.Module,
    layers: Mapping[str, PlaneWeight],
    transposed: frozenset[str],
    fixed: Mapping[str, Tensor],
    windows: Tensor,
    tuning: Tuning,
    generator: torch.Generator,
    step_done: Callable[[], None] = lambda: None,
) -> Tuned:
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
    constant = {name: weight.to(device) for name, weight in fixed.items()}
    bits = sorted({value for weight in layers.values() for value in weight.bits})
    students = [_Student(model, layers, value, planes, transposed, constant) for value in bits]
    heldout = max(1, min(16, len(windows) // 8))
    training, checking = windows[:-heldout], windows[-heldout:]
    chosen = batches(len(training), max(1, tuning.batch_tokens // windows.shape[1]), generator)
    parameters = [change for student in students for change in student.change.values()]
    optimizer = torch.optim.Adam(parameters, lr=tuning.learning_rate, betas=(0.9, 0.99))
    for student in students:
        student.look(checking)
    for step in range(tuning.steps):
        warm = min(1.0, (step + 1) / max(1.0, 0.05 * tuning.steps))
        set_rate(optimizer, tuning.learning_rate * warm * cosine(step, tuning.steps))
        tokens = training[next(chosen)].to(device)
        target = _original(model, tokens)
        optimizer.zero_grad(set_to_none=True)
        for student in students:  # one after the other, so that one graph is in memory at a time
            (_kl(target, student.logits(tokens)) / tokens.numel()).backward()
        optimizer.step()
        if (step + 1) % max(1, tuning.steps // LOOKS) == 0 or step + 1 == tuning.steps:
            for student in students:
                student.look(checking)
        step_done()
    return Tuned(
        {name: _with_best(weight, students, name) for name, weight in layers.items()},
        {student.bits: (student.first_loss, student.best_loss) for student in students},
    )


class _Student:
    """The model at one precision: what its coefficients are, what is trained, and the best so far."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, PlaneWeight],
        bits: int,
        planes: Mapping[str, tuple[Grouping, Tensor]],
        transposed: frozenset[str],
        constant: Mapping[str, Tensor],
    ) -> None:
        self.model, self.bits, self.planes = model, bits, planes
        self.transposed, self.constant = transposed, constant
        self.start: dict[str, Tensor] = {}  # [bits + 1, groups], the offset last
        self.change: dict[str, Tensor] = {}
        self.unit: dict[str, Tensor] = {}
        self.bytes: dict[str, Tensor] = {}  # units of the coefficients that are stored as bytes, one a group
        for name, weight in layers.items():
            scales = weight.scales[bits]
            assert not isinstance(scales, Codebook)
            grouping, device = planes[name][0], planes[name][1].device
            fp16 = scales.affine()
            start = torch.cat([fp16.scale.reshape(bits, -1), fp16.offset.reshape(1, -1)]).to(device).float()
            if isinstance(scales, ByteScales):
                self.bytes[name] = scales.unit.to(device).repeat_interleave(grouping.groups)
            self.start[name], self.change[name] = start, torch.zeros_like(start, requires_grad=True)
            self.unit[name] = start[-2].square().mean().sqrt().clamp_min(1e-12)
        self.best_loss = self.first_loss = math.inf
        self.best: dict[str, Tensor] = {}

    def coefficients(self, name: str) -> Tensor:
        """As they are stored, the offset last; gradients pass the rounding as if it were not there."""
        exact = self.start[name] + self.unit[name] * self.change[name]
        with torch.no_grad():
            moved = rounded(exact, self.bytes.get(name)) - exact
        return exact + moved

    def logits(self, tokens: Tensor) -> Tensor:
        """fp32 [b, S, vocabulary], from coefficients as they are stored."""
        replaced = dict(self.constant)
        for name, (grouping, planes) in self.planes.items():
            found = self.coefficients(name)
            weight = dense(grouping, planes[: self.bits], found[:-1], found[-1])
            replaced[f"{name}.weight"] = weight.T if name in self.transposed else weight
        arguments = {"input_ids": tokens, "use_cache": False}
        # a quantized head that is tied has both its names in `constant`
        return _logits(functional_call(self.model, replaced, (), arguments, tie_weights=False))

    @torch.no_grad()
    def look(self, windows: Tensor) -> None:
        """Measure the divergence on held-out windows; note the coefficients if there are none better."""
        total, device = 0.0, next(iter(self.start.values())).device
        for part in windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1])):
            tokens = part.to(device)
            total += float(_kl(_original(self.model, tokens), self.logits(tokens)))
        loss = total / windows.numel()
        if not self.best:
            self.first_loss = loss
        if not self.best or loss < self.best_loss:
            self.best_loss = loss
            self.best = {name: self.coefficients(name) for name in self.planes}


def _unpacked(weight: PlaneWeight, device: torch.device) -> tuple[Grouping, Tensor]:
    grouping = Grouping(weight.out_features, weight.in_features, weight.group_size)
    planes = [grouping.split(unpack_bits(plane, weight.in_features).to(torch.int8) * 2 - 1) for plane in weight.planes]
    return grouping, torch.stack(planes).to(device)


def _with_best(weight: PlaneWeight, students: Sequence[_Student], name: str) -> PlaneWeight:
    scales = dict(weight.scales)
    for student in students:
        old = scales[student.bits]
        assert not isinstance(old, Codebook)
        best = student.best[name].cpu()
        unit = old.unit if isinstance(old, ByteScales) else None
        scales[student.bits] = make_affine(best[:-1].reshape(old.scale.shape), best[-1].reshape(old.offset.shape), unit)
    return PlaneWeight(weight.planes, scales, weight.in_features, weight.group_size)


@torch.no_grad()
def _original(model: nn.Module, tokens: Tensor) -> Tensor:
    return _logits(model(input_ids=tokens, use_cache=False))


def _logits(output: object) -> Tensor:
    logits = output.logits  # type: ignore[attr-defined]
    assert isinstance(logits, Tensor)
    return logits.float()


def _kl(target: Tensor, found: Tensor) -> Tensor:
    """KL(target || found) summed over tokens; logits [b, S, vocabulary]."""
    reference = target.log_softmax(-1)
    return (reference.exp() * (reference - found.log_softmax(-1))).sum()
