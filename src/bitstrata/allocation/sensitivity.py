"""What each layer at each bits costs, measured from the nested file itself: nothing is requantized.

    kld       one layer at a time is lowered from the highest bits b_max and the true loss measured. From the same
              passes, the sketches (objective.py) say how the layers' errors interact:

                  loss(plan) ~ | s_0 + sum_l v_l(b_l) |^2,    s_0 = s(b_max), v_l(b) = s(l at b, others at b_max) - s_0

              so inner products of the v are kept. A sum of one-layer losses would miss that layers which
              were quantized for each other's errors at one precision partly cancel them there.
    hessian   a cheap proxy, one pass over the text: the layer loss tr(dW H dW^T), dW the difference to the
              weight at b_max and H the second moments of the layer's inputs, over the same for W itself.
              It knows nothing of how layers matter for the end.

The uniform plans are measured too: between them predictions are corrected, because beyond small
changes the loss grows slower than a square.

Kept as JSON. While `kld` is being measured, a `.part` file beside it gets one line a layer and bits, so that
killing the job loses one measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..checkpoint import CheckpointReader, Fingerprint, write_json
from ..checkpoint.schema import Strict
from ..errors import PlanError
from ..plans.plan import read_file
from ..progress import Steps
from .layer_loss import layer_losses
from .objective import SKETCH, Objective
from .unfinished import Unfinished, decode_floats, encode_floats, part_of

SENSITIVITY_FILE = "bitstrata_sensitivity.json"
SENSITIVITY_VERSION = 1
Measure = Literal["kld", "hessian"]
Array = np.ndarray[Any, Any]


class MeasurementSettings(Strict):
    """What a measurement depends on besides the model.

    text, text_sha256: name and digest of the text; reference, reference_sha256: of the model to stay close to, None for
    the model's own highest bits. windows_sha256: of its windows' tokens; None in older files.
    """

    measure: Measure
    text: str
    text_sha256: str
    reference: str | None = None
    reference_sha256: str | None = None
    windows: int
    seq_len: int
    seed: int
    windows_sha256: str | None = None


class _SensitivityFile(Strict):
    kind: Literal["bitstrata sensitivity"] = "bitstrata sensitivity"
    version: int
    model: Fingerprint
    settings: MeasurementSettings
    base_bits: int
    base_loss: float
    uniform: dict[str, float]
    losses: dict[str, dict[str, float]]
    products: str | None = None


@dataclass(frozen=True)
class Sensitivity:
    """A finished measurement.

    base_bits, base_loss: where layers are lowered from, and the loss there.
    uniform: bits -> loss with every layer at them.
    losses: layer -> bits -> what the layer at these bits adds to base_loss.
    products: float32 [M + 1, M + 1], inner products of v_l(b) in the order of `rows`, s_0 last; None without sketches.
    """

    model: Fingerprint
    settings: MeasurementSettings
    base_bits: int
    base_loss: float
    uniform: Mapping[int, float]
    losses: Mapping[str, Mapping[int, float]]
    products: Array | None = None

    @property
    def target(self) -> str:
        """What losses are divergences from, in words."""
        return self.settings.reference or f"its own {self.base_bits} bits"

    @property
    def rows(self) -> list[tuple[str, int]]:
        """(layer, bits) of each row of `products` but the last."""
        return [(layer, bits) for layer, losses in self.losses.items() for bits in losses]

    @cached_property
    def quadratic(self) -> tuple[float, Array, Array]:
        """c, a [M], Q [M, M] of the predicted loss (problem.py), a row for each of `rows`."""
        if self.products is None:
            losses = np.array([loss for of in self.losses.values() for loss in of.values()])
            return 0.0, np.zeros(len(losses)), np.diag(losses)
        products = self.products.astype(np.float64)
        return float(products[-1, -1]), 2 * products[-1, :-1], products[:-1, :-1]

    def predict(self, plan: Mapping[str, int]) -> float:
        """The loss of a plan, corrected, nats a token."""
        return self.corrected(self._square_of(np.array([plan[layer] == bits for layer, bits in self.rows])))

    def corrected(self, predicted: float) -> float:
        """Nats a token for a predicted loss: a straight line in logarithms between the uniform plans' own pairs."""
        x, y = self._curve
        if not len(x) or predicted <= 0:
            return self._offset + max(predicted, 0.0)
        exact = np.log(predicted)
        inside = float(np.clip(exact, x[0], x[-1]))
        return self._offset + float(np.exp(np.interp(inside, x, y) + exact - inside))

    @property
    def _offset(self) -> float:
        """The part of every loss that predictions do not contain: layer losses are 0 at the base."""
        return self.base_loss if self.products is None else 0.0

    @cached_property
    def _curve(self) -> tuple[Array, Array]:
        """Logarithms of predicted and of measured losses of the uniform plans, ascending."""
        points = []
        for bits, loss in self.uniform.items():
            predicted = self._square_of(np.array([of == bits for _, of in self.rows]))
            if predicted > 0 and loss > self._offset:
                points.append((predicted, loss - self._offset))
        logs = np.log(np.array(sorted(points)).reshape(-1, 2))
        return logs[:, 0], np.maximum.accumulate(logs[:, 1])

    def _square_of(self, at: Array) -> float:
        """The predicted loss of the plan whose rows are chosen in `at`, bool [M]."""
        constant, linear, products = self.quadratic
        return constant + float(linear[at].sum() + products[np.ix_(at, at)].sum())

    def save(self, path: Path) -> None:
        """Write it as JSON; the file appears whole or not at all."""
        packed = None
        if self.products is not None:
            packed = encode_floats(self.products[np.tril_indices(len(self.products))])
        file = _SensitivityFile(
            version=SENSITIVITY_VERSION,
            model=self.model,
            settings=self.settings,
            base_bits=self.base_bits,
            base_loss=self.base_loss,
            uniform={str(bits): loss for bits, loss in self.uniform.items()},
            losses={layer: {str(b): loss for b, loss in losses.items()} for layer, losses in self.losses.items()},
            products=packed,
        )
        write_json(path, file.model_dump(exclude_none=True))

    @classmethod
    def load(cls, path: Path, reader: CheckpointReader, settings: MeasurementSettings | None = None) -> Sensitivity:
        """A measurement of the checkpoint of `reader`, and with `settings` made under those.

        Raises PlanError naming what is malformed or does not match.
        """
        file = read_file(path, _SensitivityFile, SENSITIVITY_VERSION, "sensitivity file")
        file.model.check(reader, str(path))
        if settings is not None:
            check_settings(path, file.settings, settings)
        try:
            losses = {layer: {int(b): loss for b, loss in of.items()} for layer, of in file.losses.items()}
            uniform = {int(bits): loss for bits, loss in file.uniform.items()}
        except ValueError as error:
            raise PlanError(f"{path}: losses: bits must be whole numbers: {error}") from error
        spec = reader.spec
        if {layer: tuple(of) for layer, of in losses.items()} != {
            name: spec.layer_bits(name) for name in spec.planned_layers
        } or set(uniform) != set(spec.bits):
            raise PlanError(f"{path}: losses do not cover the layers and bits of the model", hint="measure again")
        products = None if file.products is None else _square(path, file.products, sum(map(len, losses.values())) + 1)
        return cls(file.model, file.settings, file.base_bits, file.base_loss, uniform, losses, products)


def check_settings(path: Path, found: MeasurementSettings, wanted: MeasurementSettings) -> None:
    """Raise PlanError naming the first setting that differs. Names of texts and models may; their content may not."""
    for name in MeasurementSettings.model_fields:
        before, now = getattr(found, name), getattr(wanted, name)
        if before != now and name not in ("text", "reference"):
            if name == "windows_sha256":  # after text, windows, seq_len and seed were found equal
                what, which = "way to cut the text into windows", "their tokens differ"
            else:
                what = {"text_sha256": "text", "reference_sha256": "reference"}.get(name, name)
                before, now = getattr(found, what), getattr(wanted, what)
                which = f"{before}, not {now}" if before != now else f"{now} had other contents"
            raise PlanError(
                f"{path} was measured with another {what}: {which}",
                hint="delete it to measure again, or name another file with --sensitivity",
            )


def measure_sensitivity(
    objective: Objective,
    reader: CheckpointReader,
    settings: MeasurementSettings,
    path: Path,
    windows: torch.Tensor,
) -> Sensitivity:
    """Measure, or go on with, the sensitivity of every layer at every bits, and save it to `path`.

    Args:
        windows: the text's windows, those of `objective`.

    Raises PlanError if an unfinished measurement beside `path` was made under other settings.
    """
    model = Fingerprint.of(reader)
    if settings.measure == "hessian":
        with Steps("measuring uniform plans", len(reader.spec.bits), "plan") as steps:
            uniform = {}
            for bits in reader.spec.bits:
                uniform[bits] = objective.loss(bits)
                steps.step()
        losses = layer_losses(objective.model, windows)
        result = Sensitivity(model, settings, objective.highest, uniform[objective.highest], uniform, losses)
    else:
        result = _measure_kld(objective, reader, settings, path, model)
    result.save(path)
    part_of(path).unlink(missing_ok=True)
    return result


def _measure_kld(
    objective: Objective,
    reader: CheckpointReader,
    settings: MeasurementSettings,
    path: Path,
    model: Fingerprint,
) -> Sensitivity:
    spec, base = reader.spec, objective.highest
    layers = {name: spec.layer_bits(name) for name in spec.planned_layers}
    unfinished = Unfinished(path, {"model": model.model_dump(), "settings": settings.model_dump()})
    found = unfinished.read()
    wanted: list[tuple[str | None, int]] = [(None, bits) for bits in sorted(spec.bits, reverse=True)]
    wanted += [(name, bits) for name, supported in layers.items() for bits in supported if bits != base]
    with unfinished, Steps("measuring", len(wanted), "plan") as steps:
        for layer, bits in wanted:
            if (layer, bits) in found:
                steps.step(skipped=True)
                continue
            plan = {**dict.fromkeys(layers, base), layer: bits} if layer else bits
            found[layer, bits] = objective.measure(plan)
            unfinished.add(layer, bits, *found[layer, bits])
            steps.step(f"{layer or 'all'} at {bits}")
    base_loss, origin = found[None, base]
    rows = [
        found[name, bits][1] - origin if bits != base else torch.zeros(SKETCH)
        for name, supported in layers.items()
        for bits in supported
    ]
    vectors = torch.stack([*rows, origin]).double().numpy()
    losses = {
        name: {bits: found[name, bits][0] - base_loss if bits != base else 0.0 for bits in supported}
        for name, supported in layers.items()
    }
    uniform = {bits: found[None, bits][0] for bits in spec.bits}
    products = (vectors @ vectors.T).astype(np.float32)
    return Sensitivity(model, settings, base, base_loss, uniform, losses, products)


def _square(path: Path, packed: str, size: int) -> Array:
    """The symmetric matrix whose lower triangle is packed. Raises PlanError unless it has `size` rows."""
    try:
        triangle = decode_floats(packed)
    except ValueError as error:
        raise PlanError(f"{path}: products: {error}", hint="measure again") from error
    if len(triangle) != size * (size + 1) // 2 or not np.isfinite(triangle).all():
        raise PlanError(f"{path}: products: expected {size} finite rows", hint="measure again")
    matrix = np.zeros((size, size), dtype=np.float32)
    matrix[np.tril_indices(size)] = triangle
    return matrix + np.tril(matrix, -1).T
