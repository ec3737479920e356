"""The stage that tunes all scales end to end (tuning.py), one precision after the other.

The result of each precision is a part of the job folder, and so is the state of the one at work, every few minutes.
When all are there they become the blocks' tuned scales, which count once every block has some.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from ..calibration import open_blockwise
from ..planes import PlaneWeight
from ..planes.pack import words_per_row
from ..planes.weights import Scales, group_count, make_scales, scales_tensors
from ..progress import Steps, log
from ..solvers import Tuning
from .chains import LEARNING, ORIGINAL
from .context import Job, Prepared, Stage
from .tuning import LOGITS, Lesson, heldout_count, look_count, tune
from .work import EACH, of_blocks, of_divergence, of_head, of_numbers

HEAD_COPIES = 6  # of a stretch's logits
STATE = 4 * 3  # bytes of a coefficient while it is tuned: its change and Adam's two moments
STORED = 2  # bytes of a coefficient, at most


class Tune(Stage):
    """Tune the scales of all blocks together."""

    needs = frozenset({"windows"})

    def __init__(self, tuning: Tuning) -> None:
        self.tuning = tuning

    def memory(self, prepared: Prepared) -> int:
        """What is in memory all the time, and a block's backward pass or the head's:

        outside the blocks and what of them is not quantized; a quantized head, fp32
        + planes, and of the highest precision each coefficient as it is stored, its best, its change, two moments
        + hidden states before each block
        + the largest block's decoded weights, fp32, the largest one's derivatives, its coefficients' derivatives, and
          4 bytes a token for the inputs of its linears twice and their outputs three times
        or logits, several times
        """
        settings, discovery = prepared.settings, prepared.discovery
        outside, inside = prepared.parameter_bytes
        bits, tokens = settings.bits[-1], max(self.tuning.batch_tokens, settings.seq_len)
        head = sum(
            4 * layer.in_features * layer.out_features * (1 + (layer.tied is not None)) for layer in prepared.head
        )
        kept = outside + sum(inside) - prepared.linear_bytes + head
        planes = sum(4 * bits * words_per_row(one.in_features) * one.out_features for one in discovery.linears)
        coefficients = _coefficients(prepared, bits)
        states = 4 * tokens * prepared.hidden_size * (len(discovery.blocks) + 3)
        most = 0
        for index in range(len(discovery.blocks)):
            linears = discovery.of_block(index)
            weights = [one.in_features * one.out_features for one in linears]
            widths = sum(prepared.shares[one.name] * (2 * one.in_features + 3 * one.out_features) for one in linears)
            work = 4 * (sum(weights) + max(weights, default=0)) + int(4 * tokens * widths)
            most = max(most, work + 4 * coefficients // len(discovery.blocks))
        stretch = max(LOGITS, 16 * prepared.vocabulary)
        logits = 4 * HEAD_COPIES * min(stretch, tokens * prepared.vocabulary)
        return kept + planes + (STATE + 2 * STORED) * coefficients + states + max(most, logits)

    def disk(self, prepared: Prepared) -> int:
        return prepared.stored_bytes(prepared.discovery.linears, planes=False)

    def passing_disk(self, prepared: Prepared) -> int:
        """Until there is a result, the tuned scales by precision, and an old and a new state of one; chains:

        the held-out ones, and the original's of the windows that are learnt from.
        """
        settings = prepared.settings
        assert prepared.windows is not None
        targets = prepared.windows.calibration.numel() * prepared.hidden_size * settings.dtype.itemsize
        scales, states = self.disk(prepared), 2 * STATE * _coefficients(prepared, settings.bits[-1])
        return max(scales, states) + targets + prepared.heldout_bytes

    def operations(self, prepared: Prepared) -> dict[torch.dtype, float]:
        """A step runs each block forward twice and backward once, which is two; logits are made, and differentiated.

        A look at the held-out windows runs each block forward once, in fp32. Both decode the planes anew.
        """
        settings, length = prepared.settings, prepared.settings.seq_len
        assert prepared.windows is not None
        steps, windows = self.tuning.steps, len(prepared.windows.calibration)
        together = max(1, self.tuning.batch_tokens // length)
        stepped = together * length
        looks, looked = 1 + look_count(steps), heldout_count(windows) * length
        head, divergence, numbers = of_head(prepared), of_divergence(prepared), of_numbers(prepared)
        found = {torch.float32: 0.0, settings.dtype: 0.0}
        for bits in settings.bits:
            weights = EACH * (bits + 1) * prepared.discovery.weight_count
            found[settings.dtype] += steps * stepped * 4 * of_blocks(prepared)
            found[torch.float32] += steps * (stepped * (3 * head + divergence + 4 * numbers) + 3 * weights)
            batches = -(-heldout_count(windows) // together)
            found[torch.float32] += looks * looked * (of_blocks(prepared) + numbers + 2 * head + divergence)
            found[torch.float32] += looks * batches * weights
        return found

    def run(self, job: Job) -> None:
        state = job.state
        parts = {bits: f"tuning-{bits}" for bits in job.settings.bits}
        if state.refined:
            log.info("resuming: the scales are already tuned")
        else:
            self._tune(job, parts)
            for index in range(len(job.discovery.blocks)):
                layers = job.planes(index)
                state.save_refined(index, {name: _tuned(job, parts, name, weight) for name, weight in layers.items()})
        self.left(job)
        for part in parts.values():
            state.drop(part)

    def left(self, job: Job) -> None:
        job.state.look()
        job.chains.drop(LEARNING)  # nothing reads it any more

    def _tune(self, job: Job, parts: Mapping[int, str]) -> None:
        device, targets = job.settings.device, job.chains.learning[ORIGINAL]
        replaced = {name: value.to(device) for name, value in {**job.embedding(), **job.output()}.items()}
        lesson = Lesson(job.windows.calibration, lambda rows: targets[rows], replaced)
        names = {f"{linear.name}.weight" for linear in job.discovery.linears}
        transposed = frozenset(linear.name for linear in job.discovery.linears if linear.transposed)
        with (
            Steps("tuning", len(parts) * self.tuning.steps, "step") as steps,
            open_blockwise(job.runner, names, lesson.windows, job.settings.dtype) as model,
        ):
            for bits, part in parts.items():
                blocks = [
                    {name: _at_bits(weight, bits) for name, weight in job.planes(index).items()}
                    for index in range(len(job.discovery.blocks))
                ]
                tuned = tune(
                    model,
                    blocks,
                    bits,
                    lesson,
                    self.tuning,
                    torch.Generator().manual_seed(job.settings.seed),
                    transposed,
                    job.state.load_all(part) if job.state.has(part) else None,
                    partial(job.state.save_tensors, part),
                    lambda skipped, bits=bits: steps.step(f"{bits} bits", skipped=skipped),  # type: ignore[misc]
                )
                log.info(f"  {bits} bits: divergence on held-out windows {tuned.before:.4f} -> {tuned.after:.4f}")


def _at_bits(weight: PlaneWeight, bits: int) -> PlaneWeight:
    """What of `weight` one precision needs."""
    return replace(weight, planes=weight.planes[:bits], scales={bits: weight.scales[bits]})


def _tuned(job: Job, parts: Mapping[int, str], name: str, weight: PlaneWeight) -> PlaneWeight:
    """`weight` with the scales that were found for it."""
    scales: dict[int, Scales] = {}
    for bits, part in parts.items():
        old = weight.scales[bits]
        keys = {f"{name}.{key}": key for key in scales_tensors(old, bits)}
        found = job.state.load_tensors(part, keys)
        scales[bits] = make_scales(old.kind, bits, {keys[key]: value for key, value in found.items()})
    return replace(weight, scales=scales)


def _coefficients(prepared: Prepared, bits: int) -> int:
    """How many coefficients all layers have at `bits`."""
    size = prepared.settings.group_size
    groups = sum(one.out_features * group_count(one.in_features, size) for one in prepared.discovery.linears)
    return (bits + 1) * groups
