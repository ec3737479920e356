"""`bitstrata.inspect`: what a checkpoint holds, what each precision costs, and which kernel will run it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..checkpoint import CheckpointReader, validate
from ..checkpoint.schema import CONFIG_FILE, INDEX_FILE
from ..errors import CheckpointError
from ..kernels import select
from ..models import resolve
from ..options import InspectOptions
from ..tables import render
from ..verbs import verb


@dataclass(frozen=True)
class Inspection:
    """What `bitstrata inspect` reports.

    bpw_read and bytes: bits -> bits per weight, bytes that one token reads of the quantized layers.
    total_bytes: size of all weight files; common_bytes: of the unquantized tensors among them.
    kernel: the one that will run each layer on this machine's default device, and why.
    verified: True if every byte of the weights was checked and is right, False if the files carry no digests to check
        them with; None if that was not asked for.
    unchecked: files of the folder that no digest covers: config.json and the weights if the index has none of them,
        and always the tokenizer, generation_config.json and reports; None if that was not asked for.
    """

    path: str
    format_version: int
    method: str
    method_options: dict[str, Any]
    group_size: int
    bits: tuple[int, ...]
    bpw_read: dict[str, float]
    bytes: dict[str, int]
    total_bytes: int
    common_bytes: int
    kernel: str
    verified: bool | None
    unchecked: tuple[str, ...] | None
    layers: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.path}: format {self.format_version}, method {self.method}, group size {self.group_size}, "
            f"{len(self.layers)} layers",
            f"files {self.total_bytes / 1e6:.2f} MB, of which {self.common_bytes / 1e6:.2f} MB are not quantized",
            f"kernel {self.kernel}",
        ]
        if self.unchecked is not None:
            config = "" if CONFIG_FILE in self.unchecked else " and every field of config.json"
            no_digests = "structure checked: ok; this folder carries no digests, so bytes cannot be checked"
            lines.append(f"every byte of the weights{config} checked: ok" if self.verified else no_digests)
            lines.append(f"without a digest, so not checked: {', '.join(self.unchecked) or 'nothing'}")
        rows = [[str(b), f"{self.bpw_read[str(b)]:.3f}", f"{self.bytes[str(b)] / 1e6:.2f}"] for b in self.bits]
        table = render("what each precision reads", ["bits", "bpw read", "MB read"], rows)
        layer_rows = [
            [layer["name"], _shape(layer), layer["decoder"],
             ",".join(map(str, layer["bits"])), str(layer["group_size"]), f"{layer['stored_bytes'] / 1e3:.1f}"]
            for layer in self.layers
        ]  # fmt: skip
        layers = render("layers", ["name", "shape", "decoder", "bits", "group", "kB stored"], layer_rows)
        return "\n".join([*lines, "", table, "", layers])


def _shape(layer: dict[str, Any]) -> str:
    shape = f"{layer['out_features']} x {layer['in_features']}"
    return shape if layer["experts"] is None else f"{layer['experts']} x {shape}"


@verb(InspectOptions)
def inspect(options: InspectOptions) -> Inspection:
    """Describe a checkpoint from its headers.

    `verify` also checks digests, finite scales and padding; `Inspection.unchecked` names what has no digest.

    Raises:
        CheckpointError: not a checkpoint, or malformed; with `verify`, all problems at once.
    """
    folder = resolve(options.path, hub=options.hub, kind="bitstrata checkpoint")
    if options.verify:
        problems = validate(folder)
        if problems:
            raise CheckpointError(
                f"{folder} is damaged:\n  " + "\n  ".join(problems), hint="copy or download the files named again"
            )
    reader = CheckpointReader(folder)
    spec = reader.spec
    layers = tuple(
        {
            "name": name,
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "decoder": layer.decoder,
            "bits": list(spec.layer_bits(name)),
            "group_size": spec.layer_group_size(name),
            "stored_bytes": spec.layer_bytes(name),
            "role": layer.role,
            "tied": layer.tied,
            "experts": layer.experts,
            "active": layer.active,
        }
        for name, layer in spec.layers.items()
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernel = select(device, torch.float32).name
    files = {folder / file for file in reader.weight_map.values()}
    total = sum(file.stat().st_size for file in files)
    size = {bits: spec.bytes_read(bits) for bits in spec.bits}
    return Inspection(
        path=str(folder),
        format_version=spec.format_version,
        method=spec.method,
        method_options=spec.method_options,
        group_size=spec.group_size,
        bits=tuple(spec.bits),
        bpw_read={str(bits): 8 * size[bits] / spec.weights_read for bits in spec.bits},
        bytes={str(bits): size[bits] for bits in spec.bits},
        total_bytes=total,
        common_bytes=total - sum(map(spec.layer_bytes, spec.layers)),
        kernel=f"{kernel} on {device}: the highest priority that can run there",
        verified=reader.has_digests if options.verify else None,
        unchecked=_unchecked(reader) if options.verify else None,
        layers=layers,
    )


def _unchecked(reader: CheckpointReader) -> tuple[str, ...]:
    """The files in the folder without a digest; the index, which holds the digests, is not one of them."""
    covered = {INDEX_FILE, *reader.digests, *([CONFIG_FILE] if reader.covers_config else [])}
    return tuple(sorted(path.name for path in reader.folder.iterdir() if path.is_file() and path.name not in covered))
