"""Plans: the bits of every layer, as a value and as a small JSON file.

A plan is a mapping from layer name to bits and goes wherever bits go. It names the layers without a
role; an output head or an embedding in planes has one precision (FORMAT.md). A plan remembers which
checkpoint it was made for, and is refused for another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError
from torch import nn

from ..checkpoint import CheckpointReader, Fingerprint, QuantizationSpec, write_json
from ..checkpoint.reader import MAX_DEPTH, is_deeper, regular_file
from ..checkpoint.schema import Strict
from ..errors import PlanError
from ..nn import bits_state

PLAN_VERSION = 1
File = TypeVar("File", bound=Strict)


class _PlanFile(Strict):
    kind: Literal["bitstrata plan"] = "bitstrata plan"
    version: int
    model: Fingerprint | None = None
    name: str = ""
    provenance: dict[str, Any] = Field(default_factory=dict)
    bits: dict[str, int]


@dataclass(frozen=True, eq=False)
class Plan(Mapping[str, int]):
    """Layer name -> bits; usable wherever bits are. Equal to any mapping with the same items.

    model: the checkpoint it was made for; None for one made by hand.
    name: what tables and messages call it; one from a file is called like the file.
    provenance: how it was made: budget, solver, predicted and measured loss; free form.
    """

    bits: Mapping[str, int]
    model: Fingerprint | None = None
    name: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", dict(self.bits))

    def __getitem__(self, layer: str) -> int:
        return self.bits[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.bits)

    def __len__(self) -> int:
        return len(self.bits)

    def __hash__(self) -> int:
        return hash(frozenset(self.bits.items()))

    def __str__(self) -> str:
        return self.name or "plan"

    @classmethod
    def uniform(cls, spec: QuantizationSpec, bits: int) -> Plan:
        """Every layer at `bits`."""
        return cls(dict.fromkeys(spec.planned_layers, bits), Fingerprint.of(spec), name=str(bits))

    def check_made_for(self, checkpoint: CheckpointReader | QuantizationSpec | Fingerprint) -> None:
        """Raise PlanError if this plan was made for another checkpoint than that."""
        if self.model is not None:
            self.model.check(checkpoint, f"the plan {self.name}".strip())

    def check(self, checkpoint: CheckpointReader | QuantizationSpec) -> None:
        """Raise PlanError unless this plan was made for that checkpoint and names its layers and their bits."""
        what = f"the plan {self.name}".strip()
        spec = checkpoint if isinstance(checkpoint, QuantizationSpec) else checkpoint.spec
        layers = {name: spec.layer_bits(name) for name in spec.planned_layers}
        self.check_made_for(checkpoint)
        for name in self.bits:
            if name not in layers:
                raise PlanError(
                    f"{what} names layer {name}, which the model "
                    + ("keeps at one precision" if name in spec.layers else "does not have")
                )
        missing = [name for name in layers if name not in self.bits]
        if missing:
            raise PlanError(
                f"{what} lacks layer {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
                hint="a plan gives bits for every quantized layer by name",
            )
        for name, bits in self.bits.items():
            if bits not in layers[name]:
                raise PlanError(
                    f"{what} asks for {bits} bits of layer {name}, which has {', '.join(map(str, layers[name]))}"
                )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; the file appears whole or not at all."""
        file = _PlanFile(
            version=PLAN_VERSION,
            model=self.model,
            name=self.name,
            provenance=dict(self.provenance),
            bits=dict(self.bits),
        )
        write_json(Path(path), file.model_dump(exclude_none=True))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """A plan from a file, called like the file; a name in it joins the provenance.

        Raises PlanError naming what is malformed.
        """
        path = Path(path)
        file = read_file(path, _PlanFile, PLAN_VERSION, "plan")
        named = {"name": file.name} if file.name else {}
        return cls(file.bits, file.model, path.stem, {**file.provenance, **named})


def layers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The layers that a plan names, each with the bits that it may have.

        small = dict.fromkeys(bitstrata.layers(model), 2)  # a plan with every layer at 2 bits

    For a model that holds one plan's pages, the bits are those in its files: `model.resize(plan)` reads them.

    Raises UsageError for a model without quantized layers.
    """
    pages = getattr(model, "pages", None)
    if pages is not None:
        return {name: tuple(sizes) for name, sizes in pages.sizes.layers.items()}
    return dict(bits_state(model).layers)


def read_file(path: Path, schema: type[File], version: int, what: str) -> File:
    """The JSON file `path` as `schema`. Raises PlanError naming the file, the field and what is wrong with it."""
    hint = f"is this a {what}? `bitstrata plan` writes them"
    try:
        raw = json.loads(regular_file(path, PlanError).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(f"there is no {what} {path}", hint="`bitstrata plan` writes them") from None
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}", hint="check the path") from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is not valid JSON: {error}", hint=hint) from error
    if is_deeper(raw, MAX_DEPTH):
        raise PlanError(f"{path} is nested more than {MAX_DEPTH} levels deep", hint=hint)
    found = raw.get("version") if isinstance(raw, dict) else None
    if isinstance(found, int) and found > version:
        raise PlanError(
            f"{path} has version {found}; this bitstrata reads up to {version}",
            hint="upgrade bitstrata: pip install -U bitstrata",
        )
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise PlanError(f"{path}: {place + ': ' if place else ''}{first['msg']}", hint=hint) from error
