"""A model as one GGUF file, which llama.cpp runs: metadata, tokenizer, chat template, and a type for each layer."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.schema import SAFETENSORS_DTYPES
from ..errors import UsageError
from ..planes import decode
from ..progress import Steps, note
from .chosen import Chosen
from .folder import check_room, whole
from .ggml import BLOCK_TYPES
from .gguf_file import gguf_package
from .gguf_model import Architecture, add_metadata, architecture_of, turned_rows
from .gguf_tokens import add_tokenizer
from .gguf_types import Asked, choose_types, encode, read_back
from .result import Written, distance

METADATA_BYTES = 1 << 25  # more than a large vocabulary takes


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: `read` gives its bytes, uint8 [rows, bytes of a row], when they are due."""

    name: str
    kind: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        rows, columns = (1, *self.shape)[-2:]
        block = BLOCK_TYPES.get(self.kind)
        return rows * (columns * (4 if self.kind == "F32" else 2) if block is None else block.row_bytes(columns))


class GGUFExport:
    """`chosen` as a GGUF file.

    Raises UsageError for an architecture, a tokenizer or tensors that are not known in GGUF, and for layers that no
    type holds, unless they may be refitted.
    """

    def __init__(self, chosen: Chosen, asked: Asked, *, refit: bool) -> None:
        self._chosen, self._asked = chosen, asked
        self._gguf = gguf_package()
        if any(layer.experts is not None for layer in chosen.reader.spec.layers.values()):
            raise UsageError("GGUF export does not know experts", hint="--format dense knows all")
        self._architecture: Architecture = architecture_of(chosen.config)
        self._kind = self._gguf.MODEL_ARCH[self._architecture.name]
        self._names = self._gguf.get_tensor_name_map(self._kind, chosen.config.num_hidden_layers)
        unquantized = [name.removesuffix(".weight") for name in chosen.kept]
        asked.check_used([*chosen.reader.spec.linears, *unquantized])
        self.types = choose_types(chosen, asked, refit=refit)
        self.layers: list[Written] = []

    def write(self, output: Path) -> int:
        """Write the file; its size in bytes."""
        writer = self._gguf.GGUFWriter(None, self._gguf.MODEL_ARCH_NAMES[self._kind])
        config = self._chosen.config
        extra = add_metadata(writer, config, self._chosen.folder.resolve().name)
        add_tokenizer(writer, self._chosen.folder, config)
        common = Counter(self.types.values()).most_common(1)[0][0]
        writer.add_file_type(self._file_type(common))
        writer.add_quantization_version(self._gguf.GGML_QUANT_VERSION)
        entries = [*self._entries(), *(self._plain(name, tensor) for name, tensor in extra.items())]
        for entry in entries:
            kind = self._gguf.GGMLQuantizationType[entry.kind]
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.nbytes, kind)
        check_room(output, sum(entry.nbytes for entry in entries) + METADATA_BYTES)
        with whole(output) as path:
            writer.open_output_file(path)
            try:
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                with Steps("writing", len(entries), "tensor") as steps:
                    for entry in entries:
                        writer.write_tensor_data(entry.read().numpy())
                        steps.step()
                writer.flush()
                for file in writer.fout or ():
                    os.fsync(file.fileno())
            finally:
                writer.close()
            size = path.stat().st_size
        return size

    def written(self, output: Path) -> Callable[[str], Tensor]:
        """Of the file at `output`, the weight of a linear by its name here: fp32 [N, K]."""
        tensors = {tensor.name: tensor for tensor in self._gguf.GGUFReader(output).tensors}

        def weight(name: str) -> Tensor:
            data = torch.from_numpy(tensors[self._name(f"{name}.weight")].data.copy())
            value = read_back(self.types[name], data.view(torch.uint8))
            order = self._order(name)
            return value if order is None else torch.empty_like(value).index_copy_(0, order, value)

        return weight

    def _file_type(self, kind: str) -> int:
        known = {one.name: int(one.value) for one in self._gguf.LlamaFileType}
        for name in (f"MOSTLY_{kind}", f"MOSTLY_{kind}_S", f"ALL_{kind}"):
            if name in known:
                return known[name]
        return int(self._gguf.LlamaFileType.GUESSED)

    def _name(self, tensor: str) -> str:
        found: str | None = self._names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UsageError(f"GGUF has no name for {tensor}", hint="--format dense writes all tensors")
        return found

    def _order(self, name: str) -> Tensor | None:
        return turned_rows(name, self._chosen.config) if self._architecture.turned else None

    def _entries(self) -> Iterator[Entry]:
        spec = self._chosen.reader.spec
        kept = list(self._chosen.kept)
        if self._chosen.config.tie_word_embeddings and "lm_head.weight" in kept:
            kept.remove("lm_head.weight")
        for name in kept:
            yield self._kept(name)
        for name, layer in spec.layers.items():
            shape = (layer.out_features, layer.in_features)
            yield Entry(self._name(f"{name}.weight"), self.types[name], shape, lambda name=name: self._layer(name))  # type: ignore[misc]

    def _layer(self, name: str) -> Tensor:
        weight, bits = self._chosen.layer(name), self._chosen.bits[name]
        order = self._order(name)
        if order is not None:
            weight = weight.take(order)
        values = decode(weight, bits)
        data = encode(self.types[name], values, weight, bits)
        self.layers.append(
            Written(name, self.types[name], bits, data.nbytes, *distance(values, read_back(self.types[name], data)))
        )
        return data

    def _kept(self, name: str) -> Entry:
        """A tensor that is not quantized: norms and biases in fp32, others as they are stored, or as is asked for."""
        stored, shape = self._chosen.reader.tensor_spec(name)
        dtype = SAFETENSORS_DTYPES[stored]
        layer = name.removesuffix(".weight")
        kind = {torch.float16: "F16", torch.bfloat16: "BF16"}.get(dtype, "F32")
        if len(shape) < 2:
            kind = "F32"
        elif (wanted := self._asked.of(layer, is_quantized=False)) is not None:
            kind = wanted
            note(f"{name}, which is not quantized, is written as {kind}")

        def read() -> Tensor:
            value = self._chosen.reader.read(name).float()
            if self._architecture.raised and name.endswith("norm.weight"):
                value = value + 1
            order = self._order(name.rpartition(".")[0])
            if order is not None:
                value = value[order]
            return encode(kind, value.view(-1, shape[-1]))

        return Entry(self._name(name), kind, shape, read)

    def _plain(self, name: str, tensor: Tensor) -> Entry:
        return Entry(name, "F32", tuple(tensor.shape), lambda: encode("F32", tensor.view(1, -1)))
