"""A measurement that is not finished: one JSON line of what it is, then one for each thing measured.

Lines are flushed as they are written; one that a kill cut short is measured again.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import PlanError, disk_errors
from .objective import SKETCH

Key = tuple[str | None, int]  # layer, bits; None stands for every layer


def part_of(path: Path) -> Path:
    """Where a measurement that will be saved to `path` is kept until it is finished."""
    return path.with_name(path.name + ".part")


class Unfinished:
    """The `.part` file of `path`. As a context manager it is open for appending.

    Args:
        identity: what must agree for a measurement to go on.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self._identity = part_of(path), identity
        self._whole = 0  # bytes of whole lines

    def read(self) -> dict[Key, tuple[float, Tensor]]:
        """Loss and sketch of what is measured already. Raises PlanError if it belongs to another measurement."""
        if not self.path.exists():
            return {}
        found: dict[Key, tuple[float, Tensor]] = {}
        with open(self.path, "rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):  # cut short, be it by that alone: what follows would go on in this line
                    break
                try:
                    value = json.loads(line)
                    if number:
                        sketch = torch.from_numpy(decode_floats(value["sketch"]))
                        if len(sketch) != SKETCH:
                            break
                        found[value["layer"], int(value["bits"])] = float(value["loss"]), sketch
                except (ValueError, KeyError, TypeError):
                    break
                if not number:
                    self._check(value)
                self._whole += len(line)
        return found

    def _check(self, identity: object) -> None:
        if identity == self._identity:
            return
        before = identity if isinstance(identity, dict) else {}
        parts = [
            f"{key} {found.get(key)!r}, now {wanted!r}"
            for name, settings in self._identity.items()
            for found in [before.get(name) or {}]
            for key, wanted in settings.items()
            if found.get(key) != wanted
        ]
        raise PlanError(
            f"{self.path} holds an unfinished measurement under other settings: {'; '.join(parts) or 'unknown ones'}",
            hint="repeat the command that began it, or delete the file",
        )

    def __enter__(self) -> Unfinished:
        with disk_errors(self.path):
            self._file = open(self.path, "ab")
        self._file.truncate(self._whole)
        if not self._whole:
            self._write(self._identity)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, layer: str | None, bits: int, loss: float, sketch: Tensor) -> None:
        """Note one measurement; it is on disk when this returns."""
        self._write({"layer": layer, "bits": bits, "loss": loss, "sketch": encode_floats(sketch.numpy())})

    def _write(self, value: object) -> None:
        with disk_errors(self.path):
            self._file.write(json.dumps(value).encode() + b"\n")
            self._file.flush()


def encode_floats(values: np.ndarray[Any, Any]) -> str:
    """Numbers as base64 of little-endian float32."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def decode_floats(text: str) -> np.ndarray[Any, Any]:
    """The opposite of `encode_floats`: float32 [n]. Raises ValueError for what is not base64 of float32."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").astype(np.float32)
