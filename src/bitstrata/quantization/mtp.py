"""Layers beside the model that predict further tokens (MTP): kept as they are in a file of their own, or dropped.

transformers leaves them out of a model, so no tensor of the checkpoint's index may be theirs; engines that draft with
them read the file by its name. They are told by their place in the source: called so, or blocks after the last one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..checkpoint import TensorEntry
from ..checkpoint.writer import write_safetensors
from ..models import Discovery, LeftOut, SourceModel
from ..models.compat import ignored_tensors
from ..progress import note
from .settings import Settings

MTP_FILE = "mtp.safetensors"
_CALLED_SO = re.compile(r"(.*\.)?(mtp|nextn|mtp_\w+|nextn_\w+)\..*")


@dataclass(frozen=True)
class Unused:
    """Stored tensors that are not part of the model, by what they are."""

    mtp: tuple[str, ...]
    others: tuple[str, ...]


def sort_unused(unused: Sequence[str], discovery: Discovery, kind: type) -> Unused:
    """Which of the `unused` tensors of a model of class `kind` are of layers that predict further tokens."""
    blocks, _, last = discovery.blocks[-1].rpartition(".")
    home = blocks.rpartition(".")[2]
    ignored = [re.compile(pattern) for pattern in ignored_tensors(kind) if "mtp" in pattern or "layers" in pattern]
    mtp = []
    for name in unused:
        after = re.search(rf"(?:^|\.){re.escape(home)}\.(\d+)\.", name)
        is_block = after is not None and int(after[1]) > int(last)
        if is_block or _CALLED_SO.fullmatch(name) or any(pattern.search(name) for pattern in ignored):
            mtp.append(name)
    return Unused(tuple(mtp), tuple(name for name in unused if name not in mtp))


def with_mtp(discovery: Discovery, source: SourceModel, mtp: Sequence[str], settings: Settings) -> Discovery:
    """`discovery` with them among what is left out, each named; says in a note what becomes of them."""
    if not mtp:
        return discovery
    kept = f"kept in {MTP_FILE}" if not settings.drop_mtp else "dropped (--drop-mtp)"
    note(f"{len(mtp)} tensors of layers that predict further tokens (MTP) are {kept}: {', '.join(mtp[:3])} ...")
    reason = f"predicts further tokens (MTP), {kept}"
    entries = tuple(LeftOut(name, source.spec(name)[1], reason) for name in mtp)
    return replace(discovery, left_out=discovery.left_out + entries)


def write_mtp(source: SourceModel, mtp: Sequence[str], settings: Settings) -> None:
    """Write their file, whole or not at all, if there are any and they are kept."""
    if not mtp or settings.drop_mtp:
        return
    entries = []
    for name in mtp:
        dtype, shape = source.kept_as(name)
        entries.append(TensorEntry(name, dtype, shape, lambda name=name, dtype=dtype: source.map(name).to(dtype)))  # type: ignore[misc]
    write_safetensors(settings.output / MTP_FILE, entries)
