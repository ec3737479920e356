"""End-to-end tuning of scales and offsets, planes frozen: the whole model at p bits imitates the original.

    minimise over a^p, z^p   mean over tokens  KL( original(x) || model_p(x) )      for each p on its own

No precision touches another's coefficients, so nesting stays exact (the idea of EfficientQAT's second stage,
arXiv 2407.11062, with the original's distribution as the target), and one precision is tuned after the other. Adam, a
short warm-up, cosine to 0. A coefficient moves in units of its layer's last scale, the distance between neighbouring
weights, so one learning rate serves all layers and all bits.

Masters are fp32; the model computes with coefficients rounded as they are stored. Some calibration windows are
held out: the coefficients with the least divergence there are kept, the start among them. The divergence is measured
in fp32, whatever the products of training are.

The original is there as its hidden states after the last block, and its head. The tuned model runs block by block
(calibration/blockwise.py): a block's weights are decoded from its packed planes when the block runs, and its
coefficients move as soon as their derivatives are known.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration import BlockwiseModel
from ..planes import PlaneWeight
from ..planes.weights import ByteScales, Codebook, Scales, make_scales, scales_tensors
from ..solvers import Tuning
from ..solvers.grouping import Grouping, make_affine
from ..solvers.joint import rounded
from ..solvers.packed import coefficient_gradient, weight_of
from ..solvers.reconstruct import batches, cosine, set_rate

LOGITS = 1 << 25  # logits held at a time
LOOKS = 8  # how often the held-out windows are measured
SAVE_SECONDS = 240.0  # between two saved states
MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq", "steps": "step"}  # of Adam: what a saved state calls them
PROGRESS = "progress"


@dataclass(frozen=True)
class Lesson:
    """What is learnt from.

    windows: int64 [n, S], at least two; the last ones are held out.
    targets: indices of windows [b] -> the original's hidden states after the last block [b, S, hidden].
    replaced: parameter name -> what is quantized of the embedding and the head, at every bits alike; fp32, where the
        blocks run.
    """

    windows: Tensor
    targets: Callable[[Tensor], Tensor]
    replaced: Mapping[str, Tensor]


@dataclass(frozen=True)
class Tuned:
    """scales: layer -> the tuned ones at the bits; before, after: the held-out divergence."""

    scales: dict[str, Scales]
    before: float
    after: float


def tune(
    model: BlockwiseModel,
    blocks: Sequence[Mapping[str, PlaneWeight]],
    bits: int,
    lesson: Lesson,
    tuning: Tuning,
    generator: torch.Generator,
    transposed: frozenset[str] = frozenset(),
    saved: dict[str, Tensor] | None = None,
    save: Callable[[dict[str, Tensor]], None] = lambda state: None,
    step_done: Callable[[bool], None] = lambda skipped: None,
) -> Tuned:
    """Tune the scales of all layers at `bits`.

    Args:
        blocks: for each block, name -> what was found for it; affine scales.
        transposed: names whose parameter holds W^T.
        saved: what an earlier run has saved last; emptied.
        save: called with the state every few minutes, and with the result.
        step_done: called after every step, with whether an earlier run has done it.
    """
    tuner = _Tuner(model, blocks, bits, lesson, tuning, transposed)
    chosen = batches(tuner.training, max(1, tuning.batch_tokens // lesson.windows.shape[1]), generator)
    if saved is None:
        tuner.look()
    else:
        tuner.restore(saved)
    begun, last_save = tuner.steps_done, time.monotonic()
    for step in range(tuning.steps):
        rows = next(chosen)
        if step >= begun:
            tuner.step(rows)
            if time.monotonic() - last_save > SAVE_SECONDS and step + 1 < tuning.steps:
                save(tuner.state())
                last_save = time.monotonic()
        step_done(step < begun)
    if begun < tuning.steps:
        save(tuner.result())
    return Tuned(tuner.best, tuner.first_loss, tuner.best_loss)


def heldout_count(windows: int) -> int:
    """How many of so many windows are held out."""
    return max(1, min(16, windows // 8))


def look_count(steps: int) -> int:
    """How often the held-out windows are measured while so many steps are done."""
    return sum(_looks_after(step, steps) for step in range(1, steps + 1))


def _looks_after(step: int, steps: int) -> bool:
    return step % max(1, steps // LOOKS) == 0 or step == steps


class _Layer:
    """A linear at one precision: packed planes, and coefficients [bits + 1, groups], the offset last."""

    def __init__(self, weight: PlaneWeight, bits: int, device: torch.device) -> None:
        scales = weight.scales[bits]
        assert not isinstance(scales, Codebook)
        self.bits, self.device, self.scales = bits, device, scales
        self.grouping = Grouping(weight.out_features, weight.in_features, weight.group_size)
        self.planes = [plane.to(device) for plane in weight.planes[:bits]]
        self.change = torch.zeros(bits + 1, self.grouping.rows * self.grouping.groups, device=device)
        # of the last scale: the distance between neighbouring weights
        self.unit = self._start()[-2].square().mean().sqrt().clamp_min(1e-12)

    def _start(self) -> Tensor:
        fp16 = self.scales.affine()
        return torch.cat([fp16.scale.reshape(self.bits, -1), fp16.offset.reshape(1, -1)]).to(self.device).float()

    def coefficients(self) -> Tensor:
        """As they are stored. Gradients pass the rounding as if it were not there."""
        unit = None
        if isinstance(self.scales, ByteScales):  # one a row, and here one a group
            unit = self.scales.unit.to(self.device).repeat_interleave(self.grouping.groups)
        return rounded(self._start() + self.unit * self.change, unit)

    def weight(self, dtype: torch.dtype) -> Tensor:
        return weight_of(self.planes, self.coefficients(), self.grouping, dtype)

    def stored(self) -> Scales:
        """The coefficients as scales, on the CPU."""
        found = self.coefficients().cpu()
        unit = self.scales.unit if isinstance(self.scales, ByteScales) else None
        old = self.scales
        return make_affine(found[:-1].reshape(old.scale.shape), found[-1].reshape(old.offset.shape), unit)


class _Tuner:
    """One precision while it is tuned, and the best of it so far."""

    def __init__(
        self,
        model: BlockwiseModel,
        blocks: Sequence[Mapping[str, PlaneWeight]],
        bits: int,
        lesson: Lesson,
        tuning: Tuning,
        transposed: frozenset[str],
    ) -> None:
        self.model, self.bits, self.lesson, self.tuning, self.transposed = model, bits, lesson, tuning, transposed
        self.blocks = [{name: _Layer(weight, bits, model.device) for name, weight in block.items()} for block in blocks]
        # one for each block, which moves as soon as its derivatives are known
        self.optimizers = [
            torch.optim.Adam([layer.change for layer in block.values()], lr=tuning.learning_rate, betas=(0.9, 0.99))
            if block
            else None
            for block in self.blocks
        ]
        self.training = len(lesson.windows) - heldout_count(len(lesson.windows))
        self.steps_done = 0
        self.best_loss = self.first_loss = math.inf
        self.best: dict[str, Scales] = {}

    def step(self, rows: Tensor) -> None:
        """One step of Adam on the windows `rows`; a look at the held-out ones where one is due."""
        steps = self.tuning.steps
        rate = self.tuning.learning_rate * cosine(self.steps_done, steps)
        rate *= min(1.0, (self.steps_done + 1) / max(1.0, 0.05 * steps))
        tokens = self.lesson.windows[rows].to(self.model.device)
        states = [self.model.ends.embed(tokens, self.lesson.replaced)]
        states.extend(self.model.forward(states[0], self._weights(self.model.products)))
        gradient = torch.empty_like(states[-1])
        self._divergence(rows, tokens, states.pop(), gradient)

        def found(index: int, name: str, derivatives: Tensor) -> None:
            name = name.removesuffix(".weight")
            layer = self.blocks[index][name]
            turned = derivatives.T if name in self.transposed else derivatives
            layer.change.grad = coefficient_gradient(layer.planes, turned, layer.grouping).mul_(layer.unit)

        def done(index: int) -> None:
            optimizer = self.optimizers[index]
            if optimizer is not None:
                set_rate(optimizer, rate)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        self.model.backward(states, gradient, self._weights(self.model.products), found, done)
        self.steps_done += 1
        if _looks_after(self.steps_done, steps):
            self.look()

    def look(self) -> None:
        """Measure the divergence on held-out windows; note the coefficients if there are none better."""
        windows, total = self.lesson.windows, 0.0
        heldout = torch.arange(self.training, len(windows))
        for rows in heldout.split(max(1, self.tuning.batch_tokens // windows.shape[1])):
            tokens = windows[rows].to(self.model.device)
            hidden = self.model.ends.embed(tokens, self.lesson.replaced)
            for state in self.model.forward(hidden, self._weights(torch.float32), torch.float32):
                hidden = state
            total += self._divergence(rows, tokens, hidden)
        loss = total / (len(heldout) * windows.shape[1])
        if not self.best:
            self.first_loss = loss
        if not self.best or loss < self.best_loss:
            self.best_loss = loss
            self.best = {name: layer.stored() for name, layer in self._layers()}

    def _weights(self, dtype: torch.dtype) -> Callable[[int], dict[str, Tensor]]:
        def made(index: int) -> dict[str, Tensor]:
            found = {name: layer.weight(dtype) for name, layer in self.blocks[index].items()}
            return {f"{name}.weight": value.T if name in self.transposed else value for name, value in found.items()}

        return made

    def _divergence(self, rows: Tensor, tokens: Tensor, hidden: Tensor, gradient: Tensor | None = None) -> float:
        """KL(original || model) summed over tokens; the derivatives of its mean by `hidden` go into `gradient`."""
        logits, total = self.model.ends.logits, 0.0
        targets = self.lesson.targets(rows)
        for part in _stretches(len(tokens), tokens.shape[1], self.model.vocabulary):
            with torch.no_grad():
                reference = targets[part].to(hidden.device).float()
                reference = logits(reference, tokens[part], {}).log_softmax(-1)
            mine = hidden[part].detach().requires_grad_(gradient is not None)
            with torch.set_grad_enabled(gradient is not None):
                output = logits(mine, tokens[part], self.lesson.replaced)
            with torch.no_grad():
                found, expected = output.log_softmax(-1), reference.exp()
                total += float((expected * (reference - found)).sum())
                if gradient is not None:  # of the loss by the logits: softmax(found) - expected
                    slope = found.exp_().sub_(expected).div_(tokens.numel())
                    (gradient[part],) = torch.autograd.grad(output, mine, slope)
        return total

    def _layers(self) -> Iterator[tuple[str, _Layer]]:
        for block in self.blocks:
            yield from block.items()

    def result(self) -> dict[str, Tensor]:
        """The best coefficients and how far the tuning is, as tensors."""
        progress = torch.tensor([self.steps_done, self.first_loss, self.best_loss], dtype=torch.float64)
        found = {PROGRESS: progress}
        for name, scales in self.best.items():
            found |= {f"{name}.{key}": value for key, value in scales_tensors(scales, self.bits).items()}
        return found

    def state(self) -> dict[str, Tensor]:
        """All that a later process needs to go on as if nothing had happened."""
        found = self.result()
        for block, optimizer in zip(self.blocks, self.optimizers, strict=True):
            for name, layer in block.items():
                found[f"{name}.change"] = layer.change
                moments = optimizer.state.get(layer.change, {}) if optimizer else {}
                found |= {f"{name}.{key}": moments[own] for key, own in MOMENTS.items() if own in moments}
        return found

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Take up what `state` or `result` has saved; `saved` is emptied."""
        steps, self.first_loss, self.best_loss = saved.pop(PROGRESS).tolist()
        self.steps_done = int(steps)
        for block, optimizer in zip(self.blocks, self.optimizers, strict=True):
            for name, layer in block.items():
                here = {key: saved.pop(f"{name}.{key}") for key in scales_tensors(layer.scales, self.bits)}
                self.best[name] = make_scales(layer.scales.kind, self.bits, here)
                if f"{name}.change" in saved:
                    layer.change.copy_(saved.pop(f"{name}.change"))
                moments = {own: saved.pop(f"{name}.{key}", None) for key, own in MOMENTS.items()}
                if optimizer is not None and all(value is not None for value in moments.values()):
                    optimizer.state[layer.change] = moments


def _stretches(count: int, length: int, vocabulary: int) -> Iterator[tuple[slice, slice]]:
    """Windows and places in them, so that the logits there are no more than `LOGITS`, or sixteen tokens'."""
    tokens = max(16, LOGITS // vocabulary)
    windows, places = max(1, tokens // length), min(length, tokens)
    for window in range(0, count, windows):
        for start in range(0, length, places):
            yield slice(window, window + windows), slice(start, start + places)
