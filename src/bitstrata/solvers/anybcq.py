"""AnyBCQ in full: alternating base, progressive expansion, block reconstruction at every bits.

For each block (arXiv 2510.10467, sections 3.1-3.3):

    base p_L        alternating BCQ of every linear; train its scales and offsets at p_L; keep them
    p_L + 1 .. p_H  one more plane from the *trained* scales of p - 1; train at p; keep them

Where paper and published code differ we take the better one (figures: docs/log.md):
  * every precision is trained on the activations of its own chain; the published code trains all
    but the base on the chain of the highest bits (`share_chain` restores that);
  * offsets are trained with the scales, and fitted with them in the expansion, as the paper's
    asymmetric scheme says; the published recipe keeps them at 0, its code at the base's value;
  * everything is fp32 until it is stored; the published expansion runs in fp16;
  * sgn(0) is +1 in the expansion too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..planes.weights import PlaneWeight
from .bcq import BCQ, Solution, base, grow
from .grouping import Grouping, affine_weight, check_weight
from .method import Block, Method, Need
from .reconstruct import LayerState, Training, reconstruct


@dataclass(frozen=True)
class AnyBCQ(Method):
    """Progressive precision expansion of binary-coded planes, scales trained block by block.

    rounds: alternations of the base and of each expansion (paper: 20).
    asymmetric: fit an offset a group (paper: yes).
    steps: training steps for each bits and block; 0 trains nothing and needs no calibration text.
    learning_rate: of Adam, in units of the layer's root-mean-square scale.
    batch_size: windows a step.
    input_mix: share of block inputs taken from the quantized chain, the rest from the original.
    train_offset: train offsets too.
    share_chain: train all bits above the lowest on the chain of the highest bits.
    """

    rounds: int = 20
    asymmetric: bool = True
    steps: int = 200
    learning_rate: float = 1e-2
    batch_size: int = 8
    input_mix: float = 0.5
    train_offset: bool = True
    share_chain: bool = False

    name = "anybcq"
    presets: ClassVar = {"fast": {"steps": 0}, "best": {"steps": 1000}}

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.steps < 0 or self.batch_size < 1:
            raise ValueError("rounds and batch_size must be at least 1, steps at least 0")
        if not 0 <= self.input_mix <= 1 or not 0 <= self.learning_rate < math.inf:
            raise ValueError("input_mix must lie in 0..1 and learning_rate must not be negative, or infinite")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"inputs"}) if self.steps else frozenset()

    @property
    def undivided(self) -> bool:
        return bool(self.steps)

    def memory(self, shapes: Sequence[tuple[int, int]], bits: tuple[int, ...], seq_len: int) -> int:
        """Training: weights in fp32, planes a byte each, dense weights and their gradients; a step's activations:

        the inputs and outputs of all linears, and their gradients.
        """
        if not self.steps:
            return 0
        weights = sum(rows * columns for rows, columns in shapes)
        return weights * (12 + max(bits)) + self.batch_size * seq_len * sum(map(sum, shapes)) * 8

    def learnt_tokens(self, seq_len: int, bits: tuple[int, ...]) -> int:
        return self.steps * self.batch_size * seq_len * len(bits)

    def solve_block(self, block: Block) -> dict[str, PlaneWeight]:
        bits = block.bits
        if not self.steps:
            return BCQ(self.rounds, self.asymmetric).solve_block(block)
        train_offset = self.train_offset and self.asymmetric
        training = Training(self.steps, self.learning_rate, self.batch_size, self.input_mix, train_offset)
        originals: dict[str, tuple[Tensor, Tensor]] = {}
        layers: dict[str, LayerState] = {}
        for name, weight in block.weights.items():
            check_weight(name, weight)
            grouping = Grouping.of(weight, block.group_size)
            originals[name] = w, d = grouping.split(weight), grouping.mask(weight.device)
            layers[name] = _state(grouping, base(w, d, bits[0], self.rounds, asymmetric=self.asymmetric))

        trained: dict[str, dict[int, tuple[Tensor, Tensor]]] = {name: {} for name in layers}
        for count in range(bits[0], bits[-1] + 1):
            if count > bits[0]:
                for name, layer in layers.items():
                    start = layer.planes.float(), layer.scale, layer.offset
                    grown = grow(*originals[name], start, self.rounds, asymmetric=self.asymmetric)
                    layers[name] = _state(layer.grouping, grown)
            if count not in bits:
                continue
            chain = block.chains[bits[-1] if self.share_chain and count > bits[0] else count]
            before, after = reconstruct(block, layers, chain, training)
            block.say(f"bits {count}: block error {before:.3e} -> {after:.3e}")
            for name, layer in layers.items():
                trained[name][count] = (layer.scale, layer.offset)
        return {name: affine_weight(layer.grouping, layer.planes > 0, trained[name]) for name, layer in layers.items()}


def _state(grouping: Grouping, solution: Solution) -> LayerState:
    planes, scale, offset = solution
    return LayerState(grouping, planes.to(torch.int8), scale, offset)
