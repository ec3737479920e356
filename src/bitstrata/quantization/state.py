"""The durable state of a job: `OUT/.job/` with its fingerprint and one file a finished part.

A part's file appears by rename after a sync, so it is whole or absent, and ends in its own digest, which is compared
before the part is used. A job is continued only by a command with the same fingerprint: arguments, model, text and
versions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoint import (
    QuantizationSpec,
    TensorEntry,
    entries_of,
    has_right_seal,
    remove_leftovers,
    write_json,
    write_safetensors,
)
from ..checkpoint.schema import SAFETENSORS_DTYPES, TensorSpec, is_plane
from ..checkpoint.writer import SEAL, TEMPORARY
from ..errors import JobError, disk_errors
from ..memory import is_out_of_memory
from ..planes.weights import PlaneWeight, make_scales

JOB_FOLDER = ".job"
HELPERS_LEAVE = 10.0  # seconds

# what is made durable at once: a block by its index; the head and the embedding by their role; a block's sensitivities
Part = int | str
FACTS = "facts"


def is_job(output: Path) -> bool:
    """Whether `output` holds an unfinished job of ours, or only the empty start of one."""
    folder = output / JOB_FOLDER
    if not folder.is_dir():
        return False
    if (folder / "job.json").exists():
        return True
    leftovers = {path.name for path in folder.iterdir()}
    only_ours = [path.name for path in output.iterdir()] == [JOB_FOLDER]
    return only_ours and leftovers <= {"lock", f"job.json{TEMPORARY}"}


class JobState:
    """The job folder of one output folder; a lock keeps a second process out while it is open.

    rank: of a process that helps the one that has the folder, and only reads what is there; it has a lock of its own.
    """

    def __init__(self, output: Path, fingerprint: dict[str, Any], spec: QuantizationSpec, rank: int = 0) -> None:
        self.output, self.folder, self.spec = output, output / JOB_FOLDER, spec
        self._facts: dict[Part, Mapping[str, Any]] = {}
        self._sound: set[Path] = set()  # files whose digest this process has compared
        if not rank:
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked(f"lock-{rank}" if rank else "lock", 0)
        try:
            if rank:
                self.look()
            else:
                for path in self.folder.glob("lock-*"):  # of helpers that have not yet seen that their leader ended
                    self._locked(path.name, HELPERS_LEAVE).release()
                self._start_or_resume(fingerprint)
        except BaseException:
            self.close()
            raise

    def _locked(self, name: str, seconds: float) -> FileLock:
        lock = FileLock(self.folder / name)
        try:
            with disk_errors(self.folder):
                lock.acquire(timeout=seconds)
        except Timeout:
            raise JobError(
                f"another process is quantizing into {self.output}", hint="wait for it, or choose another folder for -o"
            ) from None
        return lock

    def _start_or_resume(self, fingerprint: dict[str, Any]) -> None:
        path = self.folder / "job.json"
        wanted = json.loads(json.dumps(fingerprint))
        if path.exists():
            try:
                found = json.loads(path.read_text())
            except (ValueError, RecursionError, OSError) as error:
                raise JobError(
                    f"{path} is not readable: {error}", hint=f"delete {self.folder} to start over"
                ) from error
            changed = differences(found, wanted)
            if changed:
                versions = all(line.startswith("versions.") for line in changed)
                raise JobError(
                    f"{self.output} holds an unfinished job with other {'versions' if versions else 'settings'}: "
                    + "; ".join(changed),
                    hint=("install these versions again" if versions else "repeat the command that started it")
                    + f", choose another -o, or delete {self.folder}",
                )
        for folder in (self.folder, self.output):
            remove_leftovers(folder)
        if not path.exists():
            write_json(path, wanted)
        self.look()

    def close(self) -> None:
        self._lock.release()

    def finish(self) -> None:
        """The checkpoint is written: the job folder is no longer needed."""
        for path in self.folder.iterdir():
            if path.name != "lock" and path.is_file():
                path.unlink(missing_ok=True)
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, part: Part, kind: str = "block") -> Path:
        return self.folder / f"{f'{kind}-{part:04d}' if isinstance(part, int) else part}.safetensors"

    def _home(self, part: Part, tensor: str) -> Path:
        return self._file(part, "refined" if self.refined and not is_plane(tensor) else "block")

    def look(self) -> None:
        """Note whether every finished block has tuned scales, which then stand for its own (`refined`)."""
        solved = sum(1 for _ in self.folder.glob("block-*.safetensors"))
        self.refined = 0 < solved == sum(1 for _ in self.folder.glob("refined-*.safetensors"))

    def has(self, part: Part) -> bool:
        return self._file(part).exists()

    def remember(self, block: Part, facts: Mapping[str, Any]) -> None:
        """What else was found out about a block, as JSON values; it becomes durable with the block."""
        self._facts[block] = facts

    def save(self, block: Part, weights: dict[str, PlaneWeight]) -> None:
        """Make a block's result durable; `weights` by full layer name."""
        entries = [entry for name in weights for entry in entries_of(name, weights[name])]
        self._write(self._file(block), entries, {FACTS: json.dumps(self._facts.pop(block, {}))})
        self.look()

    def facts(self, block: Part) -> dict[str, Any]:
        """What was remembered of a finished block. Raises JobError if its file is damaged."""
        path = self._file(block)
        try:
            self._check(path)
            with safe_open(str(path), framework="pt") as file:
                found: dict[str, Any] = json.loads((file.metadata() or {}).get(FACTS, "{}"))
                return found
        except (SafetensorError, OSError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise _damaged(path, error) from error

    def save_refined(self, block: int, weights: dict[str, PlaneWeight]) -> None:
        """Make a block's tuned scales durable; its planes stay as they were. They count once every block has some."""
        entries = [entry for name in weights for entry in entries_of(name, weights[name])]
        self._write(self._file(block, "refined"), [entry for entry in entries if not is_plane(entry.name)])
        self.look()

    def save_tensors(self, part: Part, tensors: dict[str, Tensor]) -> None:
        """Make tensors that are not part of the result durable."""
        self._write(self._file(part), [TensorEntry.of(name, tensor) for name, tensor in tensors.items()])

    def _write(self, path: Path, entries: list[TensorEntry], metadata: Mapping[str, str] | None = None) -> None:
        self._sound.discard(path)
        write_safetensors(path, entries, metadata, sealed=True)

    def load_tensors(self, part: Part, names: Iterable[str]) -> dict[str, Tensor]:
        """Some of the tensors of `part`. Raises JobError if its file is damaged."""
        return {name: self._read(part, name) for name in names}

    def load_all(self, part: Part) -> dict[str, Tensor]:
        """All tensors of `part`. Raises JobError if its file is damaged."""
        path = self._file(part)
        try:
            with safe_open(str(path), framework="pt") as file:
                names = set(file.keys()) - {SEAL}
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
        return self.load_tensors(part, sorted(names))

    def drop(self, part: Part) -> None:
        """Remove what was saved of `part`, if anything was."""
        self._file(part).unlink(missing_ok=True)

    def load(self, part: Part, layers: Iterable[str]) -> dict[str, PlaneWeight]:
        """A finished part's layers. Raises JobError if its files are damaged."""
        return {name: self._layer(part, name) for name in layers}

    def _layer(self, block: Part, name: str) -> PlaneWeight:
        layer, bits = self.spec.layer(name), self.spec.layer_bits(name)
        read = self.load_tensors(block, self.spec.layer_tensors(name))
        tensors = {full.removeprefix(f"{name}."): value for full, value in read.items()}
        try:
            return PlaneWeight(
                tuple(tensors[f"plane_{index}"] for index in range(max(bits))),
                {value: make_scales(layer.decoder, value, tensors) for value in bits},
                layer.in_features,
                self.spec.layer_group_size(name),
            )
        except ValueError as error:
            raise _damaged(self._file(block), error) from error

    def _read(self, part: Part, tensor: str) -> Tensor:
        """A tensor of a file whose digest is compared once."""
        path = self._home(part, tensor)
        try:
            self._check(path)
            with safe_open(str(path), framework="pt") as file:
                value: Tensor = file.get_tensor(tensor)
                return value.clone()
        except (SafetensorError, OSError) as error:
            if is_out_of_memory(error):
                raise
            raise _damaged(path, error) from error

    def _check(self, path: Path) -> None:
        """Compare a file's digest, once."""
        if path not in self._sound and not has_right_seal(path):
            raise _damaged(path, "its bytes are not those that were written")
        self._sound.add(path)

    def entries(self, block: Part, layers: list[str]) -> list[TensorEntry]:
        """The block's tensors as entries that are read only when they are written; its files are compared anew."""

        def entry(name: str, spec: TensorSpec) -> TensorEntry:
            return TensorEntry(name, SAFETENSORS_DTYPES[spec[0]], spec[1], lambda: self._read(block, name))

        tensors = {full: spec for name in layers for full, spec in self.spec.layer_tensors(name).items()}
        self._sound -= {self._home(block, name) for name in tensors}
        return [entry(name, spec) for name, spec in tensors.items()]


def _damaged(path: Path, why: object) -> JobError:
    return JobError(f"{path} is damaged: {why}", hint="delete that file and run the same command again")


def differences(found: Any, wanted: Any, where: str = "") -> list[str]:
    """What differs between two fingerprints, by name: "group_size was 64, is now 128"."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            line
            for key in sorted({*found, *wanted})
            for line in differences(found.get(key), wanted.get(key), f"{where}.{key}" if where else key)
        ]
    if found == wanted:
        return []
    return [f"{where} was {_short(found)}, is now {_short(wanted)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
