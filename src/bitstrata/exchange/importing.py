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
from torch import Tensor

from .. import arguments
from ..checkpoint import (
    CheckpointReader,
    Fingerprint,
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
from ..errors import BitstrataError, CheckError, ModelError, UsageError, first_line
from ..models.config import read_config
from ..models.hf import replace_layers
from ..options import ImportOptions
from ..planes import PlaneWeight, decode, pack_bits
from ..plans import Plan
from ..progress import Steps, note, notes, own_notes
from ..torch_state import ordinary_torch
from ..verbs import verb
from ..version import __version__
from .folder import check_room, whole
from .opening import open_source
from .result import Import, distance, relative
from .sources import Layer, Source, skeleton_of
from .uniform import Coefficients, Grid, planes_of, with_bits

PARTS = ".parts"
PLAN = "exact.json"  # where layers differ in bits, a plan with the most of each


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
        config = {**source.config, "quantization_config": spec.model_dump(exclude_none=True)}
        source.copy(folder)
        write_checkpoint(folder, config, [*source.kept.values(), *weights.entries])
        weights.close()
        shutil.rmtree(folder / PARTS)
        _check(folder)
        if any(bits > spec.bits[-1] for bits in weights.own.values()):
            Plan(weights.own, Fingerprint.of(CheckpointReader(folder))).save(folder / PLAN)
            note(f"some layers have more than {spec.bits[-1]} bits: --bits {output / PLAN} runs each at its own")
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Import(
        output=str(output),
        source=str(where),
        format=source.format,
        bits=tuple(spec.bits),
        layers=len(source.layers),
        bits_of_layers={name: max(weights.layers[name].bits or ()) for name in source.layers},
        bytes=size,
        relative_error=relative(weights.error, weights.squares),
        notes=notes(),
    )


def _check(folder: Path) -> None:
    """Raise CheckError for a checkpoint that is malformed, ModelError for layers that config.json's model lacks."""
    for problem in validate(folder):
        raise CheckError(f"what was written is not a checkpoint: {problem}", hint="report this")
    reader = CheckpointReader(folder)
    try:
        model = skeleton_of(read_config(folder, reader))
        held = replace_layers(model, reader.spec)
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    except BitstrataError:
        raise
    except Exception as error:
        raise ModelError(f"config.json describes no model: {first_line(error)}", hint="download it again") from error
    stored = {name: reader.tensor_spec(name)[1] for name in reader.common_names() if name in expected}
    wrong = [name for name, shape in stored.items() if shape != expected[name]]
    tied = {layer.tied for layer in held.layers.values()} | {"lm_head"}
    missing = [name for name in expected if name not in reader.weight_map and name.rpartition(".")[0] not in tied]
    if wrong or missing:
        name = (wrong or missing)[0]
        raise ModelError(
            f"{name} is {'of another shape' if wrong else 'not there'} in the weights",
            hint="config.json and the weights are of different models",
        )


class _Weights:
    """All layers of a source in planes, in files in `folder`, and what is said of them.

    bits: what all planned layers have. own: of each planned layer the most.
    """

    def __init__(self, source: Source, folder: Path, *, rounded: bool) -> None:
        self.layers: dict[str, LayerSpec] = {}
        self.squares = self.error = 0.0
        self._entries: dict[str, list[TensorEntry]] = {}
        planned = [set(layer.bits) for layer in source.layers.values() if layer.role is None]
        lowest = tuple(sorted(set.intersection(*planned) or {min(min(bits) for bits in planned)}))
        with Steps("importing", len(source.layers), "layer") as steps:
            for number, (name, layer) in enumerate(source.layers.items()):
                weight = self._planes(name, layer, lowest, rounded=rounded)
                self._keep(folder / f"{number}.safetensors", name, layer, weight, source.dtype)
                steps.step()
        self.group_size = Counter(spec.group_size for spec in self.layers.values()).most_common(1)[0][0]
        own = {name: spec.bits or [] for name, spec in self.layers.items() if spec.role is None}
        if {max(bits) for bits in own.values()} == {lowest[-1], lowest[-1] + 1}:
            for name, bits in own.items():  # the others have a plane for what fp16 offsets leave
                if max(bits) == lowest[-1]:
                    self._extend(name)
        held = {name: tuple(self.layers[name].bits or ()) for name in own}
        self.bits = tuple(sorted(set.intersection(*map(set, held.values()))))
        self.own = {name: max(bits) for name, bits in held.items()}

    @property
    def entries(self) -> list[TensorEntry]:
        return [entry for entries in self._entries.values() for entry in entries]

    def _extend(self, name: str) -> None:
        """Give a layer one bits more, at which it is what it is at its most: by a plane of ones with scales of 0."""
        spec, entries = self.layers[name], {entry.name: entry for entry in self._entries[name]}
        most = max(spec.bits or ())
        plane, scale, offset = (
            entries[f"{name}.{what}"] for what in (f"plane_{most - 1}", f"scale_{most}", f"offset_{most}")
        )

        def ones() -> Tensor:
            return pack_bits(torch.ones(spec.out_features, spec.in_features, dtype=torch.bool))

        def scales() -> Tensor:
            known = scale.read()
            return torch.cat([known, torch.zeros_like(known[:1])])

        self._entries[name] += [
            TensorEntry(f"{name}.plane_{most}", plane.dtype, plane.shape, ones),
            TensorEntry(f"{name}.scale_{most + 1}", scale.dtype, (most + 1, *scale.shape[1:]), scales),
            TensorEntry(f"{name}.offset_{most + 1}", offset.dtype, offset.shape, offset.read),
        ]
        self.layers[name] = spec.model_copy(update={"bits": [*(spec.bits or ()), most + 1]})

    def _planes(self, name: str, layer: Layer, lowest: tuple[int, ...], *, rounded: bool) -> PlaneWeight:
        found = layer.read()
        if not isinstance(found, PlaneWeight):
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
        return with_bits(weight, lowest)

    def _measure(self, found: Grid | Coefficients, weight: PlaneWeight) -> None:
        squares, error = distance(found.values(), decode(weight, max(weight.bits), torch.float64))
        self.squares += squares
        self.error += error

    def _keep(self, path: Path, name: str, layer: Layer, weight: PlaneWeight, dtype: torch.dtype) -> None:
        entries = entries_of(name, weight)
        write_safetensors(path, entries)
        shard = Shard(path)
        self._entries[name] = [_later(entry, shard) for entry in entries]
        self._entries[name].append(TensorEntry.of(guard_name(name), torch.empty(0, dtype=dtype)))
        self.layers[name] = LayerSpec(
            in_features=weight.in_features,
            out_features=weight.out_features,
            decoder=weight.kind,  # type: ignore[arg-type]
            bias=layer.bias,
            bits=list(weight.bits),
            group_size=weight.group_size,
            role=layer.role,  # type: ignore[arg-type]
            tied=layer.tied,
        )

    def spec(self, source: Source) -> QuantizationSpec:
        usual = self.group_size or 1
        layers = {}
        for name, one in self.layers.items():
            same = {"group_size": None} if one.group_size == usual else {}
            if one.role is None and one.bits == list(self.bits):
                same["bits"] = None
            layers[name] = one.model_copy(update=same)
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
        self._entries.clear()


def _later(entry: TensorEntry, shard: Shard) -> TensorEntry:
    return TensorEntry(entry.name, entry.dtype, entry.shape, lambda: shard.read(entry.name))
