"""Which shapes of programs the kernels run with: rules that need no measurement, and what was measured for a device.

A device's file has for some products the numbers that were fastest:

    {"device": "NVIDIA H200",
     "few_rows": {"4096x14336": {"2": {"blocks": 1, "warps": 8, "registers": 128}, "4": ...}},
     "many_rows": {"4096x14336x2x64": {"blocks": 1, "warps": 4, "rows": 64, "stages": 2}}}

few_rows by out_features x in_features and then bits, all with the same number of warps: it decides the order of a
sum, and a row must come out the same whatever bits the others in its call have. many_rows with bits and the most rows
that it is for. `bitstrata bench --tune` writes them into the user's folder (`user_folder`); configs/ here has those
that come with the package. The user's win, shape by shape; what is in neither follows the rules below.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ...errors import KernelError
from .tiled import DENSE_ROWS, TiledWeight

ROW_STEPS = (32, 64, 128, DENSE_ROWS)  # numbers of rows that have measured configurations of their own
FOLDER = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class FewRows:
    """A program takes `blocks` blocks of 16 rows of W; its `warps` share the columns, `registers` a thread (0: any)."""

    blocks: int
    warps: int
    registers: int

    def __post_init__(self) -> None:
        _expect_powers(self, "blocks", "warps")
        if type(self.registers) is not int or not 0 <= self.registers <= 255:
            raise ValueError(f"registers must lie in 0..255, got {self.registers!r}")


@dataclass(frozen=True)
class ManyRows:
    """A program takes `warps` times `blocks` blocks of 16 rows of W, and `rows` of x; loads run `stages` ahead."""

    blocks: int
    warps: int
    rows: int
    stages: int

    def __post_init__(self) -> None:
        _expect_powers(self, "blocks", "warps", "rows")
        if type(self.stages) is not int or not 1 <= self.stages <= 8:
            raise ValueError(f"stages must lie in 1..8, got {self.stages!r}")


def _expect_powers(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < 1 or value & (value - 1):
            raise ValueError(f"{name} must be a power of two, got {value!r}")


@dataclass(frozen=True)
class Measured:
    """What was fastest on a device: few_rows by `shape_key` and bits, many_rows by `many_rows_key`."""

    few_rows: dict[str, dict[int, FewRows]] = field(default_factory=dict)
    many_rows: dict[str, ManyRows] = field(default_factory=dict)

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> Measured:
        """From a file's content. Raises ValueError, TypeError or AttributeError if it is not one."""
        few = {
            shape: {int(bits): FewRows(**entry) for bits, entry in by_bits.items()}
            for shape, by_bits in content.get("few_rows", {}).items()
        }
        for shape, found in few.items():
            if len({config.warps for config in found.values()}) != 1:
                raise ValueError(f"{shape} must have one number of warps at all bits")
        return cls(few, {key: ManyRows(**entry) for key, entry in content.get("many_rows", {}).items()})

    def merged(self, other: Measured) -> Measured:
        """With what `other` knows, which wins."""
        return Measured(self.few_rows | other.few_rows, self.many_rows | other.many_rows)


def user_folder() -> Path:
    """Where measured files are kept beside the package's own."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitstrata" / "triton"


def device_name(device: torch.device) -> str:
    """The device's name as its file has it: NVIDIA H200 -> nvidia-h200."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "default"
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())


@lru_cache
def _measured(name: str) -> Measured:
    """What is known of a device, read once; nothing if there is no file. Raises KernelError for a file that is bad."""
    known = Measured()
    for folder in (FOLDER, user_folder()):
        path = folder / f"{name}.json"
        if path.is_file():
            known = known.merged(_read(path))
    return known


def _read(path: Path) -> Measured:
    try:
        return Measured.parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise KernelError(
            f"{path} is not a file of measured configurations: {error}",
            hint="delete it; `bitstrata bench --tune` makes a new one",
        ) from error


@lru_cache
def _name_of(device: torch.device) -> str:
    return device_name(device)


@lru_cache
def _hopper(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


def shape_key(weight: TiledWeight) -> str:
    return f"{weight.out_features}x{weight.in_features}"


def many_rows_key(weight: TiledWeight, bits: int, rows: int) -> str:
    """Numbers of rows share what was measured for the next of ROW_STEPS."""
    step = next((step for step in ROW_STEPS if rows <= step), ROW_STEPS[-1])
    return f"{shape_key(weight)}x{bits}x{step}"


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
    found = _measured(_name_of(weight.planes[0].device)).few_rows.get(shape_key(weight))
    if found is None:
        return rule
    rule = replace(rule, warps=next(iter(found.values())).warps)
    return found.get(bits, rule) if fits else rule


def many_rows(weight: TiledWeight, bits: int, rows: int) -> ManyRows:
    """The program for more rows."""
    found = _measured(_name_of(weight.planes[0].device)).many_rows.get(many_rows_key(weight, bits, rows))
    if found is not None:
        return found
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


def save(device: torch.device, measured: Measured, folder: Path | None = None) -> Path:
    """Add what was measured to the device's file in `folder` (the user's by default), whose path is returned.

    Raises OSError if it cannot be written.
    """
    path = (folder or user_folder()) / f"{device_name(device)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = (_read(path) if path.is_file() else Measured()).merged(measured)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "default"
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps({"device": name, **asdict(known)}, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    _measured.cache_clear()
    return path
