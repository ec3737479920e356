"""What an export or an import gives back: prints as a table, converts to JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..tables import render

HELD = 2.0**-10  # the largest relative error that counts as holding a weight: of coefficients rounded to fp16


@dataclass(frozen=True)
class Written:
    """A quantized layer as it was written.

    name: in the checkpoint that has planes of it. type: in the words of the other format. bits: of its planes.
    squares, error: sums of w^2 and of the squared differences.
    """

    name: str
    type: str
    bits: int
    bytes: int
    squares: float
    error: float

    @property
    def relative_error(self) -> float:
        """||W - W'|| / ||W||."""
        return relative(self.error, self.squares)


def relative(error: float, squares: float) -> float:
    return math.sqrt(error / squares) if squares else (math.inf if error else 0.0)


def distance(original: Tensor, found: Tensor) -> tuple[float, float]:
    """The sums of squares of `original`, and of the difference to `found`, in float64."""
    exact = original.double()
    return float(exact.square().sum()), float((exact - found.double()).square().sum())


@dataclass(frozen=True)
class Export:
    """The result of `bitstrata.export_model`.

    relative_error: ||W - W'|| / ||W|| over all quantized layers. exact: whether it is 0 in every one.
    kld: the mean divergence, in nats a token, of the written weights from the model at these bits, on `text`; None if
        no text was given. top1_agreement, tokens: of the same positions.
    """

    output: str
    format: str
    model: str
    bits: int | str
    bytes: int
    layers: tuple[Written, ...]
    text: str | None = None
    kld: float | None = None
    top1_agreement: float | None = None
    tokens: int = 0
    notes: tuple[str, ...] = ()

    @property
    def relative_error(self) -> float:
        return relative(sum(one.error for one in self.layers), sum(one.squares for one in self.layers))

    @property
    def exact(self) -> bool:
        return all(one.error == 0 for one in self.layers)

    def to_json(self) -> dict[str, Any]:
        layers = [
            {
                "name": one.name,
                "type": one.type,
                "bits": one.bits,
                "bytes": one.bytes,
                "relative_error": one.relative_error,
            }
            for one in self.layers
        ]
        derived = {"exact": self.exact, "relative_error": self.relative_error}
        return {**self.__dict__, **derived, "layers": layers, "notes": list(self.notes)}

    def __str__(self) -> str:
        kinds = sorted({(one.bits, one.type) for one in self.layers})
        rows = [list(self._row(bits, kind)) for bits, kind in kinds]
        at = f"at {self.bits} bits" if isinstance(self.bits, int) else f"with the plan {self.bits}"
        title = f"{self.output}: {self.format}, {self.model} {at}, {self.bytes / 1e6:.2f} MB"
        lines = [render(title, ["bits", "as", "layers", "MB", "relative error"], rows)]
        lines.append(
            "the weights are the model's, exactly"
            if self.exact
            else f"relative error of all quantized weights {self.relative_error:.2e}"
        )
        if self.kld is not None:
            lines.append(
                f"on {self.tokens} tokens of {self.text}: kld {self.kld:.6f} to the model at these bits, "
                f"top-1 {100 * (self.top1_agreement or 0):.2f}%"
            )
        return "\n".join(lines)

    def _row(self, bits: int, kind: str) -> Iterator[str]:
        own = [one for one in self.layers if (one.bits, one.type) == (bits, kind)]
        error = relative(sum(one.error for one in own), sum(one.squares for one in own))
        yield from (str(bits), kind, str(len(own)), f"{sum(one.bytes for one in own) / 1e6:.2f}")
        yield "exact" if error == 0 else f"{error:.2e}"


@dataclass(frozen=True)
class Import:
    """The result of `bitstrata.import_model`.

    bits: what every layer has. bits_of_layers: the most of each, at which a plan beside the model runs it where they
        differ (exact.json).
    exact: whether the planes, at the most bits of each layer, are the source's numbers; if not, `relative_error`.
    """

    output: str
    source: str
    format: str
    bits: tuple[int, ...]
    layers: int
    bits_of_layers: dict[str, int]
    bytes: int
    relative_error: float
    notes: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        return self.relative_error == 0

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "bits": list(self.bits), "exact": self.exact, "notes": list(self.notes)}

    def __str__(self) -> str:
        counts = {bits: list(self.bits_of_layers.values()).count(bits) for bits in self.bits_of_layers.values()}
        rows = [[str(bits), str(counts[bits])] for bits in sorted(counts)]
        title = f"{self.output}: {self.layers} layers of {self.format} from {self.source}, {self.bytes / 1e6:.2f} MB"
        lines = [render(title, ["bits of a layer", "layers"], rows)]
        lines.append(
            "the weights are the source's, exactly"
            if self.exact
            else f"relative error of all imported weights {self.relative_error:.2e}"
        )
        lines.append(f"it runs at {', '.join(map(str, self.bits))} bits")
        return "\n".join(lines)
