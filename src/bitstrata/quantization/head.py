"""The output head and the token embedding as planes: `--head-bits`.

They are quantized first, from their weights alone and a stretch of rows at a time (solvers/clipped.py), and made
durable like a block. The chains of hidden states at each bits, and those of round-to-nearest, then start from the
quantized embedding, so methods that learn make up for it, and the final check ends in the quantized head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models import HeadLayer
from ..planes import PlaneWeight, decode
from ..progress import log
from ..solvers.clipped import clipped_rows
from ..solvers.grouping import join_rows, row_chunks
from .context import Job, Prepared, Stage

CHUNK = 1 << 20  # weights solved at a time


class Head(Stage):
    """Quantize the head and the embedding, and measure how far they are from the original's."""

    def memory(self, prepared: Prepared) -> int:
        return 0  # a stretch of rows; the final check, which holds all of them, takes more

    def disk(self, prepared: Prepared) -> int:
        return prepared.stored_bytes(prepared.head)

    def run(self, job: Job) -> None:
        bits = job.settings.head_bits
        assert bits is not None
        for layer in job.prepared.head:
            if job.state.has(layer.role):
                log.info(f"resuming: {layer.name} is already done")
            else:
                log.info(f"quantizing {layer.name} at {bits} bits")
                job.state.save(layer.role, {layer.name: _solved(job, layer, bits)})
            job.layer_error[layer.name] = {str(bits): _error(job, layer, bits)}


def _rows(job: Job, layer: HeadLayer, rows: slice) -> Tensor:
    source = job.prepared.source
    stored = source.stored_name(f"{layer.name}.weight")
    assert stored is not None
    return source.rows(stored, rows.start, rows.stop).to(job.settings.device).float()


def _solved(job: Job, layer: HeadLayer, bits: int) -> PlaneWeight:
    chunks = row_chunks(layer.out_features, layer.in_features, CHUNK)
    return join_rows([clipped_rows(_rows(job, layer, rows), bits, job.settings.group_size) for rows in chunks])


def _error(job: Job, layer: HeadLayer, bits: int) -> float:
    """||W - W_bits||^2 / ||W||^2."""
    (planes,) = job.state.load(layer.role, [layer.name]).values()
    wrong = total = 0.0
    for rows in row_chunks(layer.out_features, layer.in_features, CHUNK):
        weight = _rows(job, layer, rows).cpu()
        dense = decode(planes.rows(rows.start, rows.stop), bits)
        wrong += float((dense - weight).square().sum(dtype=torch.float64))
        total += float(weight.square().sum(dtype=torch.float64))
    return wrong / max(total, 1e-30)
