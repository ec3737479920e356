"""What the caller did to torch changes no value: every public function of kernels and planes, in every state."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from helpers import random_weight
from torch import Tensor
from torch_states import STATES as MODES

from bitstrata import kernels, planes
from bitstrata.kernels import linear_many, pack, registry
from bitstrata.kernels.cpu import missing
from bitstrata.kernels.triton import KERNEL, TiledWeight
from bitstrata.planes.weights import join_scales, scales_tensors

N, K = 37, 70
BITS = (2, 4, 6)
ROWS = (1, 5, 17, 40)
DTYPES = (torch.bfloat16, torch.float16)


def inside(state: Callable[[], AbstractContextManager[Any]]) -> Callable:
    def run(call: Callable[[], Any]) -> Any:
        with state():
            return call()

    return run


def while_tracing(call: Callable[[], Any]) -> Any:
    results = []
    torch.jit.trace(lambda x: (results.append(call()), x * 1)[1], torch.ones(1), check_trace=False)
    return results[0]


def compiled(call: Callable[[], Any]) -> Any:
    torch._dynamo.reset()
    return torch.compile(call, backend="eager")()


STATES: dict[str, Callable] = {
    **{name: inside(mode) for name, mode in MODES.items()},
    "jit.trace": while_tracing,
    "compile": compiled,
}


class Inputs:
    def __init__(self, scales: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = random_weight(N, K, BITS, 32, scales, seed)
        self.weights = [pack(self.weight, kernel="reference"), *([] if missing else [pack(self.weight)])]
        self.xs = [
            torch.randn(rows, K, generator=generator).to(dtype)
            for rows in ROWS
            for dtype in (torch.float32, torch.bfloat16)
        ]
        self.row_bits = [torch.tensor(BITS)[torch.randint(3, (len(x),), generator=generator)] for x in self.xs]
        self.index = torch.randint(N, (2, 20), generator=generator)
        self.bits = torch.rand(N, K, generator=generator) < 0.5

    def pages(self) -> tuple[int, list[Tensor], planes.Scales]:
        return 6, list(self.weight.planes[4:]), self.weight.scales[6]


def tensors_of(result: Any) -> list[Any]:
    """A result as tensors and plain values, in order."""
    if isinstance(result, planes.PlaneWeight):
        return [*result.tensors().values()]
    if isinstance(result, kernels.Weight):
        return [*result.stored().tensors().values()]
    if isinstance(result, (list, tuple)):
        return [part for each in result for part in tensors_of(each)]
    return [result]


# public function -> calls of it; f(inputs) is compared with itself in the ordinary state
CALLS: dict[str, Callable[[Inputs], Any]] = {
    "Weight": lambda i: [
        weight.linear(x, bits) for weight in i.weights for x, b in zip(i.xs, i.row_bits, strict=True) for bits in (4, b)
    ],
    "lookup": lambda i: [weight.lookup(i.index, 4, dtype) for weight in i.weights for dtype in DTYPES],
    "linear_many": lambda i: [
        linear_many(x, [weight, weight], bits)
        for weight in i.weights
        for x, b in zip(i.xs, i.row_bits, strict=True)
        for bits in (2, b)
    ],
    "arithmetic": lambda i: [
        weight.linear(x, bits, arithmetic)
        for x, b in zip(i.xs, i.row_bits, strict=True)
        for weight, arithmetic in zip(i.weights, ("exact", "int8"), strict=False)
        for bits in (2, b)
    ],
    "pack": lambda i: [pack(i.weight), pack(i.weight, apart=True), pack(i.weight.prefix(4)).with_pages(*i.pages())],
    "select": lambda i: kernels.select("cpu", torch.float32).name,
    "describe": lambda i: [report.reason for report in kernels.describe("cpu", torch.float32)],
    "TiledWeight": lambda i: [
        TiledWeight.pack(i.weight, KERNEL),
        TiledWeight.pack(i.weight.prefix(4), KERNEL).with_pages(*i.pages()),
    ],
    "decode": lambda i: [planes.decode(i.weight, b, d) for b in BITS for d in (torch.float32, torch.float64)],
    "codes": lambda i: planes.codes(i.weight, 4),
    "signs": lambda i: planes.signs(i.weight, 1),
    "pack_bits": lambda i: planes.pack_bits(i.bits),
    "unpack_bits": lambda i: planes.unpack_bits(i.weight.planes[0], K),
    "join_scales": lambda i: list(
        scales_tensors(join_scales([i.weight.outputs(0, 9).scales[6], i.weight.outputs(9, N).scales[6]]), 6).values()
    ),
    "PlaneWeight": lambda i: [i.weight.prefix(4), i.weight.outputs(3, 20), i.weight.take(i.index.flatten())],
}
# what a forward pass may contain; the rest is done when weights are loaded, where nothing is recorded
RECORDED = ("Weight", "lookup", "linear_many")
NOT_EXPORTED = {"TiledWeight", "arithmetic", "join_scales", "lookup"}
NO_TENSORS = {
    "Kernel", "KernelReport", "is_plain", "Scales", "group_count", "whole_number",
    "words_per_row",
}  # fmt: skip
DECODERS = {"AffineScales", "ByteScales", "Codebook"}  # what a PlaneWeight is made of


def test_every_public_function_is_here():
    assert set(kernels.__all__) | set(planes.__all__) == (CALLS.keys() - NOT_EXPORTED) | (NO_TENSORS | DECODERS)


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python", "ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize(
    ("name", "state"),
    [(name, state) for name in CALLS for state in STATES if name in RECORDED or state not in ("jit.trace", "compile")],
)
def test_the_state_changes_no_value(name, state, seed, monkeypatch):
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    call = CALLS[name]
    for scales in ("affine", "affine8", "codebook"):
        inputs = Inputs(scales, seed)
        expected = tensors_of(call(inputs))
        found = tensors_of(STATES[state](partial(call, inputs)))
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            if isinstance(theirs, Tensor):
                assert (ours.dtype, ours.device, ours.shape) == (theirs.dtype, theirs.device, theirs.shape), scales
                assert torch.equal(ours, theirs), scales
            else:
                assert ours == theirs, scales
