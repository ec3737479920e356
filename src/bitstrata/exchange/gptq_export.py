"""A model in the format of GPTQ (v1), which vLLM and transformers run: one number of bits, groups with a zero point.

    W[n, k] = scale[j, n] (q[n, k] - zero[j, n]),    q, zero whole, 0 <= q < 2^b, 1 <= zero < 2^b, b in BITS

Planes on a uniform grid whose offset is such a multiple of the step are held as they are. An even grid around 0 has
its levels at odd multiples of half a step, which 8 bits hold exactly, up to 7 bits. All else is fitted anew.
Embedding and head stay numbers: the programs that read this have no kernels for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..checkpoint import TensorEntry, write_json
from ..checkpoint.schema import CONFIG_FILE, LayerSpec
from ..errors import UsageError
from ..models.discover import local_name
from ..planes import PlaneWeight, decode, group_count
from ..progress import Steps
from ..quantization.companions import companions, copy_companions
from .chosen import Chosen
from .dense import SHARD_BYTES, write_shards
from .fitting import fit_zero_point, zero_point_codes
from .folder import check_room, whole
from .folder_import import gptq_grid
from .result import HELD, Written, distance, relative
from .stored import Stored
from .streams import pack_stream, words_of
from .tensors import model_tensors
from .uniform import Grid, grid_of

BITS = (2, 3, 4, 8)
SAMPLE = 32  # rows that tell whether a layer is held
CHUNK = 1 << 20  # weights fitted at a time


class GPTQExport:
    """`chosen` as a folder of GPTQ.

    Raises UsageError for a plan of several bits, groups of several sizes or shapes that the format has not, and for
    layers that it does not hold, unless they may be refitted.
    """

    def __init__(self, chosen: Chosen, asked: str | Sequence[str], *, refit: bool) -> None:
        self._chosen = chosen
        spec = chosen.reader.spec
        self._names = [name for name, layer in spec.layers.items() if layer.role is None]
        self._check_shapes()
        bits = {chosen.bits[name] for name in self._names}
        sizes = {spec.layer_group_size(name) for name in self._names}
        if len(bits) > 1 or len(sizes) > 1:
            what = f"bits {sorted(bits)}" if len(bits) > 1 else f"groups of {sorted(sizes)}"
            raise UsageError(f"GPTQ has one number for all layers, these have {what}", hint="--format gguf has types")
        self.group_size = sizes.pop()
        self.bits = self._bits(bits.pop(), _asked(asked), refit=refit)
        self.layers: list[Written] = []
        self._is_even = True
        self._done: Callable[[], None] = lambda: None

    def _check_shapes(self) -> None:
        for name in self._names:
            layer: LayerSpec = self._chosen.reader.spec.layers[name]
            if layer.experts is not None:
                raise UsageError("GPTQ export does not know experts", hint="--format dense knows all")
            place = self._chosen.skeleton.get_submodule(local_name(self._chosen.skeleton, name))
            if isinstance(place, Conv1D) or layer.in_features % 32 or layer.out_features % 32:
                raise UsageError(
                    f"{name} [{layer.out_features}, {layer.in_features}] is of no shape that GPTQ kernels take",
                    hint="both must be multiples of 32, of an ordinary linear layer; --format dense knows all",
                )

    def _bits(self, own: int, asked: int | None, *, refit: bool) -> int:
        """The smallest of BITS that hold every layer, or that has `own` bits; or what is asked. Raises UsageError."""
        known = [bits for bits in BITS if bits >= own] if asked is None else [asked]
        if refit:
            return known[0]
        errors: dict[int, tuple[float, str]] = {}
        for bits in known:
            for name in self._names:
                weight = self._chosen.layer(name)
                rows = torch.linspace(0, weight.out_features - 1, min(SAMPLE, weight.out_features)).long()
                sample = weight.take(rows)
                values = decode(sample, own)
                squares, error = distance(values, self._fit(sample, own, bits).values())
                if relative(error, squares) > HELD:
                    errors[bits] = relative(error, squares), name
                    break
            if bits not in errors:
                return bits
        error, name = errors[known[0]]
        raise UsageError(
            f"GPTQ does not hold these weights as they are: {name} ({own} bits) in {known[0]} bits would have a "
            f"relative error of {error:.3f}",
            hint="--refit fits them anew and says what is lost; with --type 8, in 8 bits",
        )

    def _fit(self, weight: PlaneWeight, own: int, bits: int) -> Grid:
        """The weight, or the nearest that is found, on a grid of the format."""
        values, size = decode(weight, own), min(self.group_size, weight.in_features)
        rows, columns = values.shape
        groups = group_count(columns, size)
        grid = grid_of(weight, own)
        step, zero = torch.empty(rows, groups), torch.empty(rows, groups)
        code = torch.empty(rows, columns, dtype=torch.uint8)
        top = 2**bits - 1
        count = max(1, CHUNK // columns)
        for start in range(0, rows, count):
            some = slice(start, start + count)
            for group in range(groups):
                part = slice(group * size, (group + 1) * size)
                given = []
                if grid is not None:
                    known = grid.step[some, group].float(), grid.low[some, group].float()
                    given = [known, (known[0] / 2, known[1])]
                x = values[some, part]
                step[some, group], zero[some, group] = fit_zero_point(x, top, given)
                code[some, part] = zero_point_codes(x, step[some, group], zero[some, group], top).to(torch.uint8)
        return Grid(code, step.double(), -(step * zero).double(), bits, size)

    def write(self, output: Path, dtype: torch.dtype) -> int:
        """Write the folder; the bytes of its weights. `dtype`: of an embedding or head that has planes."""
        entries = list(self._entries(dtype))
        size = sum(entry.nbytes for entry in entries)
        check_room(output, size + sum(path.stat().st_size for path in companions(self._chosen)))
        with whole(output) as folder:
            folder.mkdir()
            with Steps("writing", 2 * len(self._names), "layer") as steps:  # the file has scales behind all codes
                self._done = steps.step
                write_shards(folder, entries, SHARD_BYTES)
            copy_companions(self._chosen, folder)
            config = {key: value for key, value in self._chosen.reader.config.items() if key != "quantization_config"}
            write_json(folder / CONFIG_FILE, {**config, "quantization_config": self.settings})
        return size

    @property
    def settings(self) -> dict[str, Any]:
        """The quantization_config. `sym`, once the layers were written: whether every zero point is in the middle."""
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": False,
            "sym": self._is_even,
            "checkpoint_format": "gptq",
            "lm_head": False,
            "true_sequential": True,
        }

    def written(self, output: Path, dtype: torch.dtype) -> Callable[[str], Tensor]:
        """Of the folder at `output`, the weight of a linear: fp32 [N, K]."""
        stored = Stored.of(output)

        def weight(name: str) -> Tensor:
            if name in self._names:
                return gptq_grid(stored, name, self.settings).values().float()
            return self._chosen.decoded(name, dtype).float()

        return weight

    def _entries(self, dtype: torch.dtype) -> Iterator[TensorEntry]:
        quantized = {f"{name}.weight" for name in self._names}
        for entry in model_tensors(self._chosen, dtype, lambda name: self._chosen.decoded(name, dtype)):
            if entry.name not in quantized:
                yield entry
        fitted = _Latest(self._layer)
        for name in self._names:
            layer = self._chosen.reader.spec.layers[name]
            rows, columns = layer.out_features, layer.in_features
            groups = group_count(columns, self.group_size)
            shapes = {
                "g_idx": (columns,),
                "qweight": (words_of(columns, self.bits), rows),
                "qzeros": (groups, words_of(rows, self.bits)),
                "scales": (groups, rows),
            }
            for key, shape in shapes.items():
                kind = torch.float16 if key == "scales" else torch.int32
                yield TensorEntry(f"{name}.{key}", kind, shape, lambda name=name, key=key: fitted(name)[key])  # type: ignore[misc]

    def _layer(self, name: str) -> dict[str, Tensor]:
        """The tensors of a layer."""
        weight, own = self._chosen.layer(name), self._chosen.bits[name]
        grid = self._fit(weight, own, self.bits)
        zero = (-grid.low / torch.where(grid.step == 0, 1.0, grid.step)).round()
        zero = torch.where(grid.step == 0, 2.0 ** (self.bits - 1), zero)
        self._is_even &= bool((zero == 2 ** (self.bits - 1)).all())
        tensors = {
            "qweight": pack_stream(grid.code, self.bits).T.contiguous(),
            "qzeros": pack_stream((zero - 1).T.long(), self.bits),
            "scales": grid.step.half().T.contiguous(),
            "g_idx": (torch.arange(weight.in_features) // self.group_size).int(),
        }
        if all(one.name != name for one in self.layers):
            size = sum(tensor.nbytes for tensor in tensors.values())
            measured = distance(decode(weight, own), grid.values())
            self.layers.append(Written(name, f"gptq {self.bits} bits", own, size, *measured))
        self._done()
        return tensors


def _asked(types: str | Sequence[str]) -> int | None:
    """The bits of the result, where `--type` says them. Raises UsageError for what is none of BITS."""
    given = [types] if isinstance(types, str) else list(types)
    if not given:
        return None
    if len(given) > 1 or given[0] not in map(str, BITS):
        raise UsageError(f"GPTQ has no type {', '.join(given)}", hint=f"--type 8 writes 8 bits; one of {BITS}")
    return int(given[0])


class _Latest:
    """A function of a name that keeps what it gave for the last one."""

    def __init__(self, function: Callable[[str], dict[str, Tensor]]) -> None:
        self._function = function
        self._name: str | None = None
        self._value: dict[str, Tensor] = {}

    def __call__(self, name: str) -> dict[str, Tensor]:
        if name != self._name:
            self._name, self._value = name, self._function(name)
        return self._value
