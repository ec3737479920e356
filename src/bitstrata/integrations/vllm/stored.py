"""The stored tensors that one of vLLM's layers is made of, and the part of them that a worker holds.

vLLM joins layers that share an input: q, k and v; gate and up. Their planes are joined along the output features, which
is exact, for every output feature has its own planes and scales. So the parts must have the same input, bits, groups
and kind of scales. Experts are stored as one: their tensors have one more dimension in front.

Tensor parallelism cuts

    output features   anywhere: rows of the planes and of the scales
    input features    between groups, and between words of 32 columns: planes and scales

A cut inside a group would leave two workers with the scales of one group each; it could be done, but then a group's
activations are no longer rounded together and the result is another one than on one worker. It is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from ...checkpoint import QuantizationSpec
from ...errors import UsageError
from ...planes.pack import WORD_BITS, words_per_row
from ...planes.weights import scales_shapes


@dataclass(frozen=True)
class Piece:
    """One stored tensor as a worker holds it: its dtype and shape, and its dimensions that a cut goes along."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    output_dim: int
    input_dim: int | None = None

    def of(self, experts: int) -> Piece:
        """The same of so many experts."""
        inputs = None if self.input_dim is None else self.input_dim + 1
        return Piece(self.dtype, (experts, *self.shape), self.output_dim + 1, inputs)


@dataclass(frozen=True)
class Stored:
    """Layers of a checkpoint, joined along their output features.

    Args:
        names: of the layers, in the order in which they are joined.
        outputs: output features of each.
        bits: for which scales are kept, as many planes as the highest of them needs.
        dropped: what vLLM reads as well, because other layers need it.
        experts: how many there are of such layers; None for one.
    """

    names: tuple[str, ...]
    outputs: tuple[int, ...]
    in_features: int
    group_size: int
    kind: str
    bits: tuple[int, ...]
    experts: int | None = None
    dropped: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return " + ".join(self.names)

    @classmethod
    def of(
        cls, spec: QuantizationSpec, names: Sequence[str], needed: Collection[int], loaded: Collection[int]
    ) -> Stored:
        """The joined layers `names`, at the bits that they are `needed` at; one with a role has bits of its own.

        Args:
            loaded: the bits that any layer of the model is needed at, and for which files are read.

        Raises UsageError if they cannot be joined.
        """
        layers = [spec.layers[name] for name in names]
        kept = {name: spec.layer_bits(name) for name in names}
        if layers[0].role is None:
            kept = {name: tuple(one for one in bits if one in loaded) for name, bits in kept.items()}
        found = {
            (layer.in_features, spec.layer_group_size(name), layer.decoder, kept[name], layer.experts)
            for name, layer in zip(names, layers, strict=True)
        }
        if len(found) > 1:
            raise UsageError(
                f"vLLM joins {', '.join(names)} into one layer, but the checkpoint has other bits, groups or kinds of "
                "scales for some of them",
                hint="quantize them alike",
            )
        in_features, group_size, kind, bits, experts = found.pop()
        outputs = tuple(layer.out_features for layer in layers)
        whole = cls(tuple(names), outputs, in_features, group_size, kind, bits, experts)
        if layers[0].role is not None:
            return whole
        part = replace(whole, bits=tuple(one for one in bits if one in needed))
        rest = whole.pieces(1, in_features).keys() - part.pieces(1, in_features).keys()
        return replace(part, dropped=tuple(sorted(rest)))

    def pieces(self, rows: int, columns: int) -> dict[str, Piece]:
        """The tensors of a worker that has `rows` output features and `columns` input features of the layers."""
        words = words_per_row(columns)
        pieces = {f"plane_{index}": Piece(torch.int32, (rows, words), 0, 1) for index in range(max(self.bits))}
        grouped = self.group_size < self.in_features  # else all columns share their scales, whoever has them
        for bits in self.bits:
            for name, (dtype, shape) in scales_shapes(self.kind, bits, rows, columns, self.group_size).items():
                output = 1 if name.startswith("scale_") else 0
                has_groups = grouped and name.startswith(("scale_", "offset_"))
                pieces[name] = Piece(dtype, shape, output, output + 1 if has_groups else None)
        return pieces if self.experts is None else {name: one.of(self.experts) for name, one in pieces.items()}

    def check_cut(self, columns: int, workers: int) -> None:
        """Raise UsageError unless `columns` input features are those of a worker, cut where scales and words end."""
        if columns == self.in_features:
            return
        unit = self.group_size if self.kind != "codebook" and self.group_size < self.in_features else 1
        for size, what in ((unit, f"groups of {self.group_size} columns"), (WORD_BITS, "words of 32 columns")):
            if columns % size:
                raise UsageError(
                    f"{self.title}: {self.in_features} input features cannot be cut for {workers} workers: "
                    f"{columns} columns each are no whole {what}",
                    hint="take a smaller --tensor-parallel-size, pipeline parallelism, or a smaller group size",
                )
