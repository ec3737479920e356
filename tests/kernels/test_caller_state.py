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
from bitstrata.kernels import registry
from bitstrata.kernels.cpu import BlockedWeight, missing
from bitstrata.kernels.triton import TiledWeight
from bitstrata.planes.weights import join_scales, scales_tensors

N, K = 37, 70
BITS = (2, 4, 6)
ROWS = (1, 5, 17, 40)


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
        self.blocked = None if missing else pack(self.weight)
        self.tiled = TiledWeight.pack(self.weight, KERNEL)
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
    if isinstance(result, (BlockedWeight, TiledWeight)):
        return [*result.stored().tensors().values()]
    if isinstance(result, (list, tuple)):
        return [part for each in result for part in tensors_of(each)]
    return [result]


# public function -> calls of it; f(inputs) is compared with itself in the ordinary state
CALLS: dict[str, Callable[[Inputs], Any]] = {
    "plane_linear": lambda i: [pack(i.weight).linear(x, 4) for x in i.xs],
    "plane_linear_rows": lambda i: [
        pack(i.weight).linear(x, b) for x, b in zip(i.xs, i.row_bits, strict=True)
    ],
    "plane_lookup": lambda i: pack(i.weight).lookup(i.index, 4, torch.bfloat16),
    "prepared_linear": lambda i: [
        linear_many(x, [i.blocked, i.blocked], bits)
        for x, b in zip(i.xs, i.row_bits, strict=True)
        for bits in (2, b)
    ],
    "linear_in": lambda i: [
        kernels.linear_in(arithmetic, x, weight, bits)
        for x, b in zip(i.xs, i.row_bits, strict=True)
        for arithmetic, weight in (("exact", i.weight), ("exact", i.blocked), ("int8", i.blocked))
        for bits in (2, b)
    ],
    "prepared_lookup": lambda i: i.blocked.lookup(i.index, 4, torch.float16),
    "prepare": lambda i: kernels.prepare(i.weight, torch.float32),
    "without_pages": lambda i: kernels.without_pages(i.weight.kind, N, K, 32, "cpu", torch.float32).with_pages(
        2, i.weight.planes[:2], i.weight.scales[2]
    ),
    "select": lambda i: kernels.select(kernels."cpu", torch.float32).name,
    "describe": lambda i: [
        report.reason for report in kernels.describe(kernels."cpu", torch.float32)
    ],
    "BlockedWeight": lambda i: [
        pack(i.weight),
        pack(i.weight.prefix(4)).with_pages(*i.pages()),
    ],
    "TiledWeight": lambda i: [TiledWeight.pack(i.weight, KERNEL), TiledWeight.pack(i.weight.prefix(4), KERNEL).with_pages(*i.pages())],
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
RECORDED = ("plane_linear", "plane_linear_rows", "plane_lookup", "prepared_linear", "prepared_lookup")
NATIVE = ("linear_in", "prepared_linear", "prepared_lookup", "prepare", "without_pages", "BlockedWeight")
NOT_EXPORTED = {"BlockedWeight", "TiledWeight", "join_scales"}
NO_TENSORS = {
    "KernelReport", "PreparedWeight", "Problem", "is_plain", "select_in", "Scales", "group_count", "whole_number",
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
    if missing and name in NATIVE:
        pytest.skip(missing)
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
