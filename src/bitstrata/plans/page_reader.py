"""Read single pages of a checkpoint: of one layer some planes and one set of scales, and nothing else.

Files are read, not mapped: what was read and dropped leaves no trace in the process, and a file that
was cut off under a running process is an error instead of a signal. They stay open: a folder that is
deleted or written anew while a model runs does not change what the model reads; what can no longer
be read as it was when the reader was made is an error.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import CheckpointReader
from ..checkpoint.reader import Shard, check_spec, check_values
from ..checkpoint.schema import CONFIG_FILE, INDEX_FILE, SAFETENSORS_DTYPES, TensorSpec
from ..errors import CheckpointError
from ..memory import allocate
from ..planes.pack import words_per_row
from ..planes.weights import Scales, make_scales, scales_bytes, scales_shapes

Stamp = tuple[int, ...]


class _File:
    """One safetensors file, kept open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        Shard(path)  # the library checks the header: names, and data without gaps up to the end of the file
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  (closed with this object)
        length = int.from_bytes(self._file.read(8), "little")
        self._tensors: dict[str, Any] = json.loads(self._file.read(length))
        self._start = 8 + length
        self._stamp = _stamp(os.fstat(self._file.fileno()))

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def read(self, name: str, expected: TensorSpec, expert: int | None = None) -> Tensor:
        """Tensor `name`, or one expert's part of it, in memory of its own.

        Raises CheckpointError unless it is there, whole and as expected.
        """
        entry = self._tensors.get(name)
        if entry is None:
            raise CheckpointError(f"tensor {name} is missing from {self.path}")
        check_spec(name, self.path.name, (entry["dtype"], tuple(entry["shape"])), expected)
        begin, end = entry["data_offsets"]
        dtype, shape = expected
        if expert is not None:
            size, shape = (end - begin) // shape[0], shape[1:]
            begin, end = begin + expert * size, begin + (expert + 1) * size
        raw = allocate(end - begin)
        left = memoryview(raw.numpy())  # type: ignore[arg-type]
        try:
            self._file.seek(self._start + begin)
            while left and (count := self._file.readinto(left)):
                left = left[count:]
            unchanged = _stamp(os.fstat(self._file.fileno())) == self._stamp
        except OSError as error:
            raise CheckpointError(f"{name} in {self.path} cannot be read: {error.strerror}") from error
        if left or not unchanged:
            raise CheckpointError(
                f"{self.path} was changed while the model was in use; {name} cannot be read",
                hint="restore the file and load the model again",
            )
        return raw.view(SAFETENSORS_DTYPES[dtype]).view(shape)


class PageReader:
    """Reads pages of the checkpoint that `reader` describes, for as long as it lives. Not thread-safe.

    Args:
        verify: compare the sha256 of each file with the one in the index when it is first opened; reads all of it.
    """

    def __init__(self, reader: CheckpointReader, *, verify: bool = False) -> None:
        self.spec, self.folder = reader.spec, reader.folder
        self.checkpoint, self._verify = reader, verify
        self._files: dict[str, _File] = {}
        self._stamps = self._description()
        self.bytes_read = 0  # of tensors, since the start

    def pages(self, layer: str, held: int, bits: int) -> tuple[list[Tensor], Scales]:
        """Planes held..bits-1 of `layer`, int32 [N, ceil(K/32)] each, and its scales for `bits`.

        Raises CheckpointError naming the tensor and file that is missing, damaged or not as described.
        """
        home, expert = self.spec.linears[layer]
        described, group_size = self.spec.layers[home], self.spec.layer_group_size(home)
        expected = self.spec.layer_tensors(home)
        planes = [self._read(name, expected[name], expert) for name in (f"{home}.plane_{i}" for i in range(held, bits))]
        tensors = {}
        for key in scales_shapes(described.decoder, bits, described.out_features, described.in_features, group_size):
            name = f"{home}.{key}"
            tensors[key] = self._read(name, expected[name], expert)
            check_values(name, self.checkpoint.weight_map[name], tensors[key])
        return planes, make_scales(described.decoder, bits, tensors)

    def page_bytes(self, layer: str, held: int, bits: int) -> int:
        """Bytes of what `pages` reads."""
        described = self.spec.layer(layer)
        rows, columns = described.out_features, described.in_features
        scales = scales_bytes(described.decoder, bits, rows, columns, self.spec.layer_group_size(layer))
        return 4 * max(0, bits - held) * rows * words_per_row(columns) + scales

    def _read(self, tensor: str, expected: TensorSpec, expert: int | None) -> Tensor:
        file = self.checkpoint.weight_map.get(tensor)
        if file is None:
            raise CheckpointError(f"tensor {tensor} is not listed in {self.folder / INDEX_FILE}")
        if file not in self._files:
            if self._description() != self._stamps:
                raise CheckpointError(
                    f"{self.folder} was written anew while the model was in use; {file} cannot be trusted",
                    hint="load the model again",
                )
            if self._verify:
                self.checkpoint.check_digest(file)
            self._files[file] = _File(self.folder / file)
        value = self._files[file].read(tensor, expected, expert)
        self.bytes_read += value.nbytes
        return value

    def _description(self) -> list[Stamp | None]:
        """What tells whether the files that describe the others are the same still."""
        return [_stamp_of(self.folder / name) for name in (CONFIG_FILE, INDEX_FILE)]


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _stamp_of(path: Path) -> Stamp | None:
    try:
        return _stamp(path.stat())
    except OSError:
        return None
