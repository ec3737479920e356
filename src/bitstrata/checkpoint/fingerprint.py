"""Which checkpoint something was made for: a plan, an order of pages, a file of sensitivities.

`layout` is a digest of everything that decides which bits exist and how many bytes they are, `weights` one of the
files' digests. Another checkpoint is refused, not tried.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ..errors import PlanError
from .reader import CheckpointReader
from .schema import QuantizationSpec, Strict


class Fingerprint(Strict):
    """Which checkpoint something was made for.

    layout: sha256 of every layer's name, shape, bits, group size, scales and role.
    weights: sha256 of the digests in the index; None where it has none, as after `save_pretrained`.
    """

    layout: str
    weights: str | None = None

    @classmethod
    def of(cls, checkpoint: CheckpointReader | QuantizationSpec) -> Fingerprint:
        """That of a checkpoint; a spec alone knows no digests."""
        if isinstance(checkpoint, QuantizationSpec):
            return cls(layout=_digest(_layout(checkpoint)))
        digests = checkpoint.digests
        return cls(layout=_digest(_layout(checkpoint.spec)), weights=_digest(digests) if digests else None)

    def check(self, checkpoint: CheckpointReader | QuantizationSpec | Fingerprint, what: str) -> None:
        """Raise PlanError if `what` (e.g. "plan.json") was made for another checkpoint than this."""
        other = checkpoint if isinstance(checkpoint, Fingerprint) else Fingerprint.of(checkpoint)
        where = f" in {checkpoint.folder}" if isinstance(checkpoint, CheckpointReader) else ""
        if self.layout != other.layout:
            raise PlanError(
                f"{what} was made for another model than the one{where or ' given'}: "
                "its layers, their shapes or bits differ",
                hint="make one for this model with `bitstrata plan OUT --budget ...`",
            )
        if self.weights and other.weights and self.weights != other.weights:
            raise PlanError(
                f"{what} was made for other weights than those{where}: the model was quantized again since",
                hint="make it again with `bitstrata plan OUT --budget ...`",
            )


def _layout(spec: QuantizationSpec) -> list[Any]:
    return [
        [name, layer.out_features, layer.in_features, spec.layer_bits(name), spec.layer_group_size(name),
         layer.decoder, layer.bias, layer.role, layer.tied, *([layer.experts] if layer.experts else [])]
        for name, layer in sorted(spec.layers.items())
    ]  # fmt: skip


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
