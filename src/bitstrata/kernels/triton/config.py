"""Which shapes of programs the kernels run with: rules that need no measurement, and what was measured for a device.

A device's file, configs/<device>.json, or one of the same name in the user's folder (`user_folder`, which wins), has
for some products the numbers that were fastest:

    {"device": "NVIDIA H200", "few_rows": {"4096x14336x2": {"blocks": 1, "warps": 8, "registers": 128}},
     "many_rows": {...}}

keyed by out_features x in_features x bits. Everything that is not there follows the rules below.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch

from .tiled import TiledWeight

FEW_ROWS = 16  # up to here rows are multiplied plane by plane, from the planes
DENSE_ROWS = 512  # from here on a whole decoded weight pays for being written and read again
FOLDER = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class FewRows:
    """A program takes `blocks` blocks of 16 rows of W; its `warps` share the columns, `registers` a thread (0: any)."""

    blocks: int
    warps: int
    registers: int


@dataclass(frozen=True)
class ManyRows:
    """A program takes `warps` times `blocks` blocks of 16 rows of W, and `rows` of x; loads run `stages` ahead."""

    blocks: int
    warps: int
    rows: int
    stages: int


Config = TypeVar("Config", FewRows, ManyRows)


def user_folder() -> Path:
    """Where measured files are kept beside the package's own."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitstrata" / "triton"


def device_name(device: torch.device) -> str:
    """The device's name as its file has it: NVIDIA H200 -> nvidia-h200."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "default"
    return "-".join(name.lower().split())


@lru_cache
def _measured(name: str) -> dict[str, dict[str, dict[str, int]]]:
    """The device's file, read once; empty if there is none."""
    for folder in (user_folder(), FOLDER):
        path = folder / f"{name}.json"
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            return {kind: content.get(kind, {}) for kind in ("few_rows", "many_rows")}
    return {"few_rows": {}, "many_rows": {}}


@lru_cache
def _name_of(device: torch.device) -> str:
    return device_name(device)


@lru_cache
def _hopper(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


def key(weight: TiledWeight, bits: int) -> str:
    return f"{weight.out_features}x{weight.in_features}x{bits}"


def few_rows(weight: TiledWeight, bits: int, rows: int, mixed: bool) -> FewRows:
    """The program for up to FEW_ROWS rows, or rows at their own bits (`bits` the most of them).

    The number of warps, which decides the order of a sum, does not depend on rows: a row is the same in any batch.
    A warp should have four tiles or more. Two blocks halve the work on activations, where there are blocks enough
    and registers: 128 a thread leave room for 16 warps on a multiprocessor.
    """
    rule = FewRows(blocks=1, warps=next((count for count in (8, 4, 2) if weight.chunks >= 4 * count), 1), registers=0)
    fits = weight.kind != "codebook" and rows <= 8 and not mixed and weight.unit >= 64
    if fits:
        rule = replace(
            rule,
            blocks=2 if weight.blocks >= 448 and bits <= 2 else 1,
            registers=128 if bits * 128 <= 4 * weight.unit else 0,
        )
    found = _measured(_name_of(weight.planes[0].device))["few_rows"].get(key(weight, bits))
    if found is None:
        return rule
    return FewRows(**found) if fits else replace(rule, warps=found["warps"])


def many_rows(weight: TiledWeight, bits: int, rows: int) -> ManyRows:
    """The program for more rows."""
    found = _measured(_name_of(weight.planes[0].device))["many_rows"].get(key(weight, bits))
    if found is not None:
        return ManyRows(**found)
    hopper = _hopper(weight.planes[0].device)  # its matrix product takes weights from registers as they are
    return ManyRows(blocks=1, warps=4, rows=32 if rows <= 32 else 128 if rows > 64 and hopper else 64, stages=2)


def few_rows_candidates() -> list[FewRows]:
    """For up to 8 rows."""
    return [
        FewRows(blocks, warps, registers)
        for blocks in (1, 2, 4)
        for warps in (2, 4, 8, 16)
        for registers in (0, 96, 128)
    ]


def many_rows_candidates() -> list[ManyRows]:
    return [
        ManyRows(blocks, warps, rows, stages)
        for blocks in (1, 2)
        for warps in (4, 8)
        for rows in (32, 64, 128)
        for stages in (2, 3)
    ]


def best(candidates: list[Config], seconds: Callable[[Config], float]) -> Config:
    """The fastest candidate; `seconds` measures one, and raises RuntimeError for one that the device cannot run.

    Raises RuntimeError if none can be run.
    """
    times: dict[Config, float] = {}
    for candidate in candidates:
        try:
            times[candidate] = seconds(candidate)
        except RuntimeError:  # out of registers or shared memory
            continue
    if not times:
        raise RuntimeError("no configuration can run on this device")
    return min(times, key=lambda candidate: times[candidate])


def save(device: torch.device, chosen: dict[str, Config], folder: Path | None = None) -> Path:
    """Add measured configurations, by `key`, to the device's file in `folder` (the user's by default); its path."""
    path = (folder or user_folder()) / f"{device_name(device)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, object] = {}
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
    content["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "default"
    for kind, wanted in (("few_rows", FewRows), ("many_rows", ManyRows)):
        known = content.setdefault(kind, {})
        assert isinstance(known, dict)
        known |= {name: asdict(config) for name, config in chosen.items() if isinstance(config, wanted)}
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)
    _measured.cache_clear()
    return path
