"""What a job will take: disk and memory, estimated before it starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..calibrate import Windows, fisher_bytes
from ..models import Discovery, HeadLayer, SourceModel
from ..planes import words_per_row
from ..planes.weights import decoder_bytes
from .settings import Settings


def disk_bytes(
    settings: Settings,
    source: SourceModel,
    discovery: Discovery,
    head: Sequence[HeadLayer],
    common: dict[str, str],
) -> int:
    """Finished blocks, head and embedding in the job folder, plus the checkpoint made from them."""
    method, quantized = settings.method, 0
    for linear in discovery.linears:
        rows, columns = linear.out_features, linear.in_features
        quantized += rows * words_per_row(columns) * 4 * settings.bits[-1]
        for bits in settings.bits:
            quantized += decoder_bytes(method.decoder_kind(settings.bits), bits, rows, columns, settings.group_size)
    if settings.head_bits is not None:
        head_bpw = settings.head_bits / 8 + (settings.head_bits + 1) * 2 / settings.group_size
        quantized += int(sum(layer.in_features * layer.out_features for layer in head) * head_bpw)
    copied = 0
    for stored in common.values():
        dtype, shape = source.spec(stored)
        copied += torch.Size(shape).numel() * dtype.itemsize
    return 2 * quantized + copied + (4 * discovery.weight_count if method.needs_fisher else 0)


def memory_bytes(
    settings: Settings,
    model: PreTrainedModel,
    discovery: Discovery,
    head: Sequence[HeadLayer],
    windows: Windows | None,
) -> int:
    """An estimate of the peak, in bytes:

    max(weights outside the blocks in fp32 + a quantized head in fp32 and its planes, largest block in fp32 x 4)
    + hidden states: windows x seq_len x hidden x 4 bytes x (2 + 2 x bits)
    + a training step's activations: batch x seq_len x (inputs and outputs of a block's linears) x 8 bytes

    + what solving the largest layer takes (Method.layer_bytes)

    or, if that is more, what gradients of the whole model take (calibrate/fisher.py), or tuning it (refine.py).
    The interpreter and its libraries, about 0.4 GB, come on top.
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
    return max(blocks, gradients, _tuning_bytes(settings, model, discovery)) + hidden


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
