"""`bitstrata.import_model`: a checkpoint of what another program quantized, with the same weights.

The source is read once, a layer at a time. The planes of a layer wait in a file of their own until the shards, which
are sorted by planes, are written: the disk holds the result twice for a while, memory one layer.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from .. import arguments
from ..checkpoint import (
    LayerSpec,
    QuantizationSpec,
    TensorEntry,
    entries_of,
    format_version,
    validate,
    write_checkpoint,
    write_safetensors,
)
from ..checkpoint.reader import Shard
from ..checkpoint.schema import guard_name
from ..errors import CheckError, ModelError, UsageError
from ..options import ImportOptions
from ..planes import PlaneWeight, decode
from ..progress import Steps, notes, own_notes
from ..torch_state import ordinary_torch
from ..verbs import verb
from ..version import __version__
from .folder import check_room, whole
from .opening import open_source
from .result import Import, distance, relative
from .sources import Layer, Source
from .uniform import Grid, planes_of, with_bits

PARTS = ".parts"


@verb(ImportOptions)
@ordinary_torch()
@own_notes()
def import_model(options: ImportOptions) -> Import:
    """Make a checkpoint of a model that another program quantized: of a folder of safetensors, or a GGUF file.

    Its weights are the source's, number for number, at the most bits of each layer. Memory is one layer.

    Raises:
        ModelError: a source that is not whole, not known, or of a kind that planes do not hold, named.
        UsageError: scales that fp16 does not hold, without `refit`; an output that is there already.
        ResourceError: the disk has no room for it.
    """
    output = Path(arguments.path("the output", options.output, hint="give the folder to write"))
    where = Path(arguments.path("the source", options.source, hint="give its folder or .gguf file")).expanduser()
    source = open_source(where)
    if not any(layer.role is None for layer in source.layers.values()):
        raise ModelError(f"{where} has no quantized layer", hint="`bitstrata quantize` quantizes a model")
    check_room(output, 3 * source.size)
    with whole(output) as folder:
        (folder / PARTS).mkdir(parents=True)
        weights = _Weights(source, folder / PARTS, rounded=options.refit)
        spec = weights.spec(source)
        entries = [*source.kept.values(), *weights.entries]
        config = {**source.config, "quantization_config": spec.model_dump(exclude_none=True)}
        source.copy(folder)
        write_checkpoint(folder, config, entries)
        weights.close()
        shutil.rmtree(folder / PARTS)
        for problem in validate(folder):
            raise CheckError(f"what was written is not a checkpoint: {problem}", hint="report this")
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Import(
        output=str(output),
        source=str(where),
        format=source.format,
        bits=tuple(spec.bits),
        layers=len(source.layers),
        bits_of_layers={name: max(weights.layers[name].bits or spec.bits) for name in source.layers},
        bytes=size,
        relative_error=relative(weights.error, weights.squares),
        notes=notes(),
    )


class _Weights:
    """All layers of a source in planes, in files in `folder`, and what is said of them."""

    def __init__(self, source: Source, folder: Path, *, rounded: bool) -> None:
        self.layers: dict[str, LayerSpec] = {}
        self.entries: list[TensorEntry] = []
        self.squares = self.error = 0.0
        self._shards: list[Shard] = []
        planned = [set(layer.bits) for layer in source.layers.values() if layer.role is None]
        common = set.intersection(*planned)
        self.bits = tuple(sorted(common or {min(min(bits) for bits in planned)}))
        with Steps("importing", len(source.layers), "layer") as steps:
            for number, (name, layer) in enumerate(source.layers.items()):
                weight = self._planes(name, layer, rounded=rounded)
                self._keep(folder / f"{number}.safetensors", name, layer, weight, source.dtype)
                steps.step()
        self.group_size = Counter(spec.group_size for spec in self.layers.values()).most_common(1)[0][0]

    def _planes(self, name: str, layer: Layer, *, rounded: bool) -> PlaneWeight:
        found = layer.read()
        if isinstance(found, Grid):
            weight = planes_of(found, rounded=rounded)
            if weight is None:
                raise UsageError(
                    f"{name}: its scales have more digits than the fp16 numbers of planes",
                    hint="--refit rounds them and says what is lost",
                )
            self._measure(found, weight)
        else:
            weight = found
            self.squares += float(decode(weight, max(weight.bits)).double().square().sum())
        if layer.role is not None:
            most = max(weight.bits)
            return PlaneWeight(weight.planes, {most: weight.scales[most]}, weight.in_features, weight.group_size)
        return with_bits(weight, self.bits)

    def _measure(self, grid: Grid, weight: PlaneWeight) -> None:
        squares, error = distance(grid.values(), decode(weight, max(weight.bits), torch.float64))
        self.squares += squares
        self.error += error

    def _keep(self, path: Path, name: str, layer: Layer, weight: PlaneWeight, dtype: torch.dtype) -> None:
        entries = entries_of(name, weight)
        write_safetensors(path, entries)
        shard = Shard(path)
        self._shards.append(shard)
        self.entries += [_later(entry, shard) for entry in entries]
        self.entries.append(TensorEntry.of(guard_name(name), torch.empty(0, dtype=dtype)))
        own = list(weight.bits)
        self.layers[name] = LayerSpec(
            in_features=weight.in_features,
            out_features=weight.out_features,
            decoder=weight.kind,  # type: ignore[arg-type]
            bias=layer.bias,
            bits=own if layer.role is not None or own != list(self.bits) else None,
            group_size=weight.group_size,
            role=layer.role,  # type: ignore[arg-type]
            tied=layer.tied,
        )

    def spec(self, source: Source) -> QuantizationSpec:
        usual = self.group_size or 1
        layers = {
            name: one.model_copy(update={"group_size": None}) if one.group_size == usual else one
            for name, one in self.layers.items()
        }
        provenance: dict[str, Any] = {"imported_from": source.format, "bitstrata": __version__}
        return QuantizationSpec(
            format_version=format_version(layers.values()),
            method=source.format,
            method_options=source.settings,
            bits=list(self.bits),
            group_size=usual,
            layers=layers,
            provenance=provenance,
        )

    def close(self) -> None:
        """Let go of the files."""
        self._shards.clear()
        self.entries.clear()


def _later(entry: TensorEntry, shard: Shard) -> TensorEntry:
    return TensorEntry(entry.name, entry.dtype, entry.shape, lambda: shard.read(entry.name))
