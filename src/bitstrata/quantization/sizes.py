"""What a job will take: disk and memory, estimated before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..calibration import Windows, fisher_bytes
from ..checkpoint.schema import CONFIG_FILE
from ..models import Discovery, HeadLayer, SourceModel
from ..planes import words_per_row
from ..planes.weights import scales_bytes
from .companions import companions
from .settings import Settings

# What names, shapes and digests take, at most: of a tensor in the headers of its parts and of its shard, and in the
# index; of a layer in config.json and the report.
TENSOR_TEXT = 640
LAYER_TEXT = 1024


@dataclass(frozen=True)
class MemoryNeed:
    """An estimate of a job's peak, in bytes: main memory, and the memory of the GPU it runs on, if it does."""

    main: int
    gpu: int = 0

    def __str__(self) -> str:
        return f"{megabytes(self.main)} of memory" + (f" and {megabytes(self.gpu)} of GPU memory" if self.gpu else "")


def disk_bytes(
    settings: Settings,
    source: SourceModel,
    discovery: Discovery,
    head: Sequence[HeadLayer],
    common: dict[str, str],
) -> int:
    """The most that the output takes at a time, just before the job folder is removed:

    finished blocks, head and embedding + tuned scales + gradients, in the job folder
    + the checkpoint: all planes, one set of scales, unquantized tensors, files beside the weights.
    """
    method, planes, scales = settings.method, 0, 0
    for linear in discovery.linears:
        rows, columns = linear.out_features, linear.in_features
        planes += rows * words_per_row(columns) * 4 * settings.bits[-1]
        for bits in settings.bits:
            scales += scales_bytes(method.scales_kind(settings.bits), bits, rows, columns, settings.group_size)
    whole = 0  # layers with one precision
    if settings.head_bits is not None:
        for layer in head:
            rows, columns = layer.out_features, layer.in_features
            whole += rows * words_per_row(columns) * 4 * settings.head_bits
            whole += scales_bytes("affine", settings.head_bits, rows, columns, settings.group_size)
    copied = 0
    for stored in common.values():
        dtype, shape = source.spec(stored)
        copied += torch.Size(shape).numel() * dtype.itemsize
    copied += sum(path.stat().st_size for path in [source.folder / CONFIG_FILE, *companions(source)])
    tensors = len(discovery.linears) * (settings.bits[-1] + 3 * len(settings.bits)) + len(common)
    tensors += len(head) * ((settings.head_bits or 0) + 3)
    layers = len(discovery.linears) + len(head) + len(discovery.left_out)
    text = tensors * TENSOR_TEXT + layers * LAYER_TEXT
    tuned = scales if method.tuning is not None else 0
    gradients = 4 * discovery.weight_count if method.needs_fisher else 0
    return 2 * (planes + scales + whole) + tuned + gradients + copied + text


def memory_need(
    settings: Settings,
    model: PreTrainedModel,
    discovery: Discovery,
    head: Sequence[HeadLayer],
    windows: Windows | None,
) -> MemoryNeed:
    """An estimate of the peak:

    max(weights outside the blocks in fp32 + a quantized head in fp32 and its planes, largest block in fp32 x 4)
    + hidden states: windows x seq_len x hidden x 4 bytes x (2 + 2 x bits)
    + a training step's activations: batch x seq_len x (inputs and outputs of a block's linears) x 8 bytes

    + what solving the largest layer takes (Method.layer_bytes)

    or, if that is more, what gradients of the whole model take (calibration/fisher.py), or tuning it (refine.py).
    The interpreter and its libraries, about 0.4 GB, come on top. On a GPU all but the hidden states is there; main
    memory holds those, and what is on its way: whatever of the model is in memory at a time, in fp32.
    """
    inside: dict[str, int] = dict.fromkeys(discovery.blocks, 0)
    outside = 0
    for name, parameter in model.named_parameters():
        block = next((block for block in discovery.blocks if name.startswith(f"{block}.")), None)
        if block is None:
            outside += parameter.numel() * 4
        else:
            inside[block] += parameter.numel() * 4
    # the final check holds the original head and the decoded one; decoding needs the planes at 1 byte a weight or less
    whole = outside + sum(inside.values())
    outside += max((5 * layer.in_features * layer.out_features for layer in head), default=0)
    hidden = 0
    if windows is not None:
        tokens = windows.heldout.numel() + (windows.calibration.numel() if settings.method.needs_chains else 0)
        width = model.config.get_text_config(decoder=True).hidden_size
        hidden = tokens * width * 4 * (2 + 2 * len(settings.bits))
    batch = getattr(settings.method.options, "batch_size", 0) if settings.method.needs_chains else 0
    widths = [
        sum(linear.in_features + linear.out_features for linear in discovery.of_block(index))
        for index in range(len(discovery.blocks))
    ]
    training = batch * settings.seq_len * max(widths) * 8
    blocks = max(outside, 4 * max(inside.values())) + training
    blocks += max(
        settings.method.layer_bytes(linear.out_features, linear.in_features, settings.bits)
        for linear in discovery.linears
    )
    gradients = fisher_bytes(model, discovery, settings.seq_len) if settings.method.needs_fisher else 0
    tuning = _tuning_bytes(settings, model, discovery)
    work = max(blocks, gradients, tuning)
    if settings.device.type == "cpu":
        return MemoryNeed(work + hidden)
    on_its_way = whole if gradients or tuning else max(outside, *inside.values())
    return MemoryNeed(on_its_way + hidden, work)


def _tuning_bytes(settings: Settings, model: PreTrainedModel, discovery: Discovery) -> int:
    """The whole model in fp32; planes at a byte, a decoded weight and its gradient; a step's activations."""
    tuning = settings.method.tuning
    if tuning is None:
        return 0
    whole = sum(parameter.numel() for parameter in model.parameters()) * 4
    tokens = max(tuning.batch_tokens, settings.seq_len)
    widths = sum(2 * linear.in_features + 3 * linear.out_features for linear in discovery.linears)
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    return whole + discovery.weight_count * (settings.bits[-1] + 8) + 4 * tokens * (widths + 4 * vocabulary)


def megabytes(size: int) -> str:
    """A size for people: MB below a gigabyte, else GB (powers of ten)."""
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"
