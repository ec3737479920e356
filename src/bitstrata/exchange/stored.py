"""A folder of safetensors of another program: its tensors by their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..checkpoint.reader import Shard
from ..errors import CheckpointError, ModelError
from ..models.source_files import entry_file, indexed_files


@dataclass(frozen=True)
class Stored:
    """The tensors of a folder by their names, read when they are due."""

    folder: Path
    files: Mapping[str, Shard]

    @classmethod
    def of(cls, folder: Path) -> Stored:
        """Raises ModelError for files that are not whole, or pickles."""
        if not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
            raise ModelError(
                f"{folder} has its weights as pickles, which are not read",
                hint="save them as safetensors: safetensors.torch.save_file(torch.load(FILE, weights_only=True), ...)",
            )
        try:
            entry = entry_file(folder, None)
            listed = indexed_files(folder / entry) if entry.endswith(".json") else {}
            shards = [Shard(folder / file) for file in sorted(set(listed.values())) or [entry]]
        except CheckpointError as error:
            raise ModelError(error.message, hint=error.hint) from error
        return cls(folder, {name: shard for shard in shards for name in shard.names})

    def read(self, name: str) -> Tensor:
        if name not in self.files:
            raise ModelError(f"{self.folder} lacks the tensor {name}", hint="download it again")
        return self.files[name].read(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.files[name].spec(name)[1] if name in self.files else ()
