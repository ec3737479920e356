"""What an entry is asked for, and what it gives: dense weights, and the bytes that they stand for.

A folder of made weights has `made.json` (who made them, how long it took, how much memory) and, for each precision, a
safetensors file with the weights in fp32. So what takes long is apart from what is measured on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bitstrata.calibration import Windows
from bitstrata.errors import CheckError, UsageError
from bitstrata.models import discover

Options = dict[str, str]
ORIGINAL_BYTES = 2  # a weight of what is not quantized: bf16


@dataclass(frozen=True)
class Job:
    """What every entry is given alike: the model's folder, the text, and windows that are cut from it by the seed.

    cut: those to calibrate on, int64 [n, seq_len], and those that `quantize` checks itself on. work: a folder for what
    a maker has to write.
    """

    model: Path
    calibration: str
    cut: Windows
    seed: int
    work: Path

    @property
    def windows(self) -> Tensor:
        """Token ids to calibrate on, int64 [n, seq_len]."""
        return self.cut.calibration

    def loaded(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The original model."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype)
        return model.eval()


@dataclass(frozen=True)
class Made:
    """Weights at one precision.

    weights: name of a parameter -> fp32 [N, K], of each linear of the blocks. head: the same of the output head and the
    embedding, if they are quantized; with head_bits. bytes: what a token reads of the linears as the tool's own files
    store them, planes or codes with scales and zeros; head_bytes: of the head.
    """

    bits: float
    weights: dict[str, Tensor]
    bytes: int
    head: dict[str, Tensor] = field(default_factory=dict)
    head_bits: int | None = None
    head_bytes: int | None = None


def linears_of(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linears inside the model's blocks, by name: what every entry quantizes, and nothing else."""
    found = {}
    for linear in discover(model).linears:
        module = model.get_submodule(linear.name)
        assert isinstance(module, nn.Linear), f"{linear.name} is a {type(module).__name__}"
        found[linear.name] = module
    return found


def one_by_one(job: Job, quantized: Callable[[str, Tensor], tuple[Tensor, int]]) -> tuple[dict[str, Tensor], int]:
    """The weights of a tool that takes one matrix at a time, and their bytes.

    quantized: name and weight fp32 [N, K] -> what stands for it, fp32 [N, K], and its bytes.
    """
    weights, size = {}, 0
    for name, linear in linears_of(job.loaded()).items():
        value, nbytes = quantized(name, linear.weight.detach())
        weights[f"{name}.weight"], size = value.float().contiguous(), size + nbytes
    return weights, size


def taken(options: Options, name: str, default: str) -> str:
    """An option of the entry, taken out of `options`."""
    return options.pop(name, default)


def nothing_left(options: Options) -> None:
    """Raise UsageError for options that no maker took."""
    if options:
        raise UsageError(f"options {', '.join(options)} are not known here")


def save(folder: Path, made: Iterator[Made]) -> list[dict[str, object]]:
    """Write each precision as it comes; what `made.json` says of them. Raises CheckError for weights not finite."""
    points = []
    for number, point in enumerate(made):
        for name, value in (point.weights | point.head).items():
            if not value.isfinite().all():
                raise CheckError(f"{name} at {point.bits} bits is not finite")
        save_file(point.weights, folder / f"blocks-{number}.safetensors")
        save_file(point.head, folder / f"head-{number}.safetensors")
        points.append({key: value for key, value in asdict(_without_tensors(point)).items() if key not in _TENSORS})
    return points


_TENSORS = ("weights", "head")


def _without_tensors(point: Made) -> Made:
    return Made(point.bits, {}, point.bytes, {}, point.head_bits, point.head_bytes)


def load(folder: Path) -> tuple[dict[str, object], Iterator[Made]]:
    """What `made.json` says, and the precisions one at a time."""
    told = json.loads((folder / "made.json").read_text())

    def points() -> Iterator[Made]:
        for number, point in enumerate(told["points"]):
            weights = load_file(folder / f"blocks-{number}.safetensors")
            yield Made(weights=weights, head=load_file(folder / f"head-{number}.safetensors"), **point)

    return told, points()
