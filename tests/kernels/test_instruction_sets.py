"""Every instruction set of this build: against the scalar kernels, and against arithmetic without rounding."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_linear_close, random_weight
from instruction_sets import ISAS, kernel_of
from kernel_errors import chunks_of, fewest_levels, int8_errors, promise_of

from bitstrata.kernels import pack, registry
from bitstrata.kernels.cpu import blocked as module
from bitstrata.planes import AffineScales, Codebook, PlaneWeight, decode, group_count, pack_bits

ALL_BITS = tuple(range(1, 9))

pytestmark = pytest.mark.skipif(not ISAS, reason="the native kernels are not built")
isas = pytest.mark.parametrize("isa", ISAS)


def on_the_grid(rows, weight, bits, generator):
    """Activations [rows, K] that int8 holds exactly: whole multiples of 2**-6, and a 127th of each chunk's largest."""
    chunk = chunks_of(weight, bits)
    x = torch.randint(-127, 128, (rows, len(chunk)), generator=generator)
    first = (chunk.unsqueeze(1) == chunk.unique()).int().argmax(0)  # column of each chunk
    x[:, first] = 127
    return x * 2.0**-6


def random_problem(seed):
    """A weight of random shape with all bits."""
    draw = random.Random(seed)
    shape = draw.randint(1, 70), draw.randint(1, 400)
    scales = draw.choice(["affine", "affine8", "codebook"])
    return random_weight(*shape, ALL_BITS, draw.randint(1, 300), scales, seed), draw.randint(1, 20)


@isas
def test_int8_results_equal_the_scalar_ones(isa, seed):
    kernel, scalar = kernel_of(isa, "int8"), kernel_of("scalar", "int8")
    for case in range(seed, seed + 12):
        weight, rows = random_problem(case)
        row_bits = torch.randint(1, 9, (rows,), generator=torch.Generator().manual_seed(case))
        for bits in ALL_BITS:
            x = on_the_grid(rows, weight, bits, torch.Generator().manual_seed(case))
            expected = scalar.linear(x, weight, bits)
            if isa == "avx512":  # its reciprocal has 14 bits, so that a level may fall the other way
                limit = int8_errors(x, weight, bits, 255)[0]
            elif fewest_levels(kernel) != fewest_levels(scalar):
                limit = int8_errors(x, weight, bits, fewest_levels(kernel))[0] * 2
            else:  # the same numbers, added up in another order
                limit = 1e-5 * expected.abs().max()
            message = f"case={case} bits={bits} of {weight.out_features} x {weight.in_features}"
            assert ((kernel.linear(x, weight, bits) - expected).abs() <= limit).all(), message
            mixed = (kernel.linear(x, weight, row_bits) - expected).abs() <= limit
            assert mixed[row_bits == bits].all(), f"mixed, {message}"


@isas
def test_exact_results_are_those_of_the_decoded_weight(isa, seed):
    """Of each instruction set, on random shapes; test_accuracy.py puts the best one through all of its cases."""
    for case in range(seed, seed + 6):
        weight, rows = random_problem(case)
        generator = torch.Generator().manual_seed(case)
        row_bits = torch.randint(1, 9, (rows,), generator=generator)
        for bits, dtype in zip(ALL_BITS, (torch.float32, torch.bfloat16, torch.float16) * 3, strict=False):
            x, W = (
                torch.randn(rows, weight.in_features, generator=generator).to(dtype),
                decode(weight, bits, torch.float64),
            )
            message = f"case={case} bits={bits} of {weight.out_features} x {weight.in_features}"
            assert_linear_close(kernel_of(isa, "exact").linear(x, weight, bits), x, W, message)
            mixed = kernel_of(isa, "exact").linear(x, weight, row_bits)[row_bits == bits]
            assert_linear_close(mixed, x[row_bits == bits], W, f"mixed, {message}")


@isas
def test_the_plain_kernel_is_the_int8_one_for_few_rows_and_the_decoded_weight_for_more(isa, seed):
    """In float32; in 16 bits it is the int8 one for more as well."""
    for case in range(seed, seed + 4):
        weight, _ = random_problem(case)
        generator = torch.Generator().manual_seed(case)
        for rows, bits in ((1, 2), (module.FEW_ROWS, 5), (module.FEW_ROWS + 1, 3), (40, 8)):
            x = torch.randn(rows, weight.in_features, generator=generator)
            row_bits = torch.randint(1, 9, (rows,), generator=generator)
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                for chosen in (bits, row_bits):
                    y = kernel_of(isa).linear(x.to(dtype), weight, chosen)
                    if dtype != torch.float32 or rows <= module.FEW_ROWS:
                        assert torch.equal(y, kernel_of(isa, "int8").linear(x.to(dtype), weight, chosen))
                        continue
                    for value in [bits] if chosen is bits else row_bits.unique().tolist():
                        these = row_bits == value if chosen is row_bits else slice(None)
                        promise_of(kernel_of(isa), weight, value)(y[these], x[these], f"case={case} rows={rows}")


def evenly_spaced(bits, N, groups, generator):
    """Scales whose weights fall on whole levels: scales that halve from plane to plane, with signs of their own."""

    def whole(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    sizes = whole(16, 32, 2, N, groups) * 2.0**-5  # of planes 0-3 and 4-7
    halves = torch.exp2(torch.arange(bits) % 4).view(-1, 1, 1)
    signs = whole(0, 2, bits, N, groups) * 2 - 1
    return AffineScales((sizes[torch.arange(bits) // 4] / halves * signs).half(), whole(-50, 50, N, groups).half() / 64)


def whole_entries(bits, N, most, generator):
    """A table of whole numbers that span 0..most, moved."""
    table = torch.randint(0, most + 1, (N, 2**bits), generator=generator)
    table[:, 0], table[:, -1] = most, 0
    return Codebook((table - 100).half())


@isas
@pytest.mark.parametrize("group_size", [12, 32, 43, 64, 100, 128, 200, "codebook"], ids=lambda size: f"group-{size}")
def test_what_int8_and_levels_can_hold_is_computed_exactly(isa, group_size, seed):
    """No error of rounding is left to hide behind."""
    N, K = 35, 301
    generator = torch.Generator().manual_seed(seed)
    codebook = group_size == "codebook"
    size = K if codebook else group_size
    most = 127 if isa == "avx2" else 255
    weight = PlaneWeight(
        tuple(pack_bits(torch.rand(N, K, generator=generator) < 0.5) for _ in ALL_BITS),
        {
            bits: whole_entries(bits, N, most, generator)
            if codebook
            else evenly_spaced(bits, N, group_count(K, size), generator)
            for bits in ALL_BITS
        },
        K,
        size,
    )
    kernel = kernel_of(isa, "int8")
    for rows in (1, 7, 18, 31):
        row_bits = torch.randint(1, 9, (rows,), generator=generator)
        x = on_the_grid(rows, weight, 8, generator)
        together = kernel.linear(x, weight, row_bits)
        for bits in ALL_BITS:
            W = decode(weight, bits, torch.float64)
            exact = x.double() @ W.T
            limit = 2e-6 * (x.double().abs() @ W.abs().T)  # float32 sums of a few dozen terms
            error = (kernel.linear(x, weight, bits) - exact).abs()
            assert (error <= limit).all(), f"rows={rows} bits={bits}: {(error / limit).max():.1f} times the limit"
            assert ((together - exact).abs() <= limit)[row_bits == bits].all(), f"mixed, rows={rows} bits={bits}"


@isas
@pytest.mark.parametrize("name", ["", "int8", "exact"], ids=["plain", "int8", "exact"])
def test_a_forced_kernel_really_runs(isa, name, monkeypatch):
    """Every call into the extension names that instruction set."""
    called = []

    def spy(function):
        def call(*arguments):
            called.append((arguments[0], arguments[-1]))
            return function(*arguments)

        return call

    monkeypatch.setenv(registry.ENVIRONMENT, kernel_of(isa, name).name)
    packed = pack(random_weight(5, 70))
    monkeypatch.delenv(registry.ENVIRONMENT)
    monkeypatch.setattr(module, "native", SimpleNamespace(linear=spy(module.native.linear)))
    packed.linear(torch.randn(3, 70), 2)
    packed.linear(torch.randn(3, 70), torch.tensor([2, 3, 4]))
    assert called == [(isa, name == "exact")] * 2


@isas
def test_exact_calls_of_many_rows_are_decoded_by_the_forced_instruction_set(isa, monkeypatch):
    packed = pack(random_weight(5, 70), kernel=f"{isa}-exact")
    handle, called = packed.handle, []
    spy = SimpleNamespace(decode=lambda *arguments: (called.append(arguments[0]), handle.decode(*arguments)))
    with monkeypatch.context() as patch:
        patch.setattr(module.BlockedWeight, "_from_tiles", None)
        packed.linear(torch.randn(module.FEW_ROWS, 70), 2)
    packed.handle = spy
    packed.linear(torch.randn(module.FEW_ROWS + 1, 70), 2)
    assert called == [isa]


def test_an_instruction_set_that_is_not_built_is_refused():
    packed = pack(random_weight(5, 70), kernel="scalar")
    out = torch.empty(5, 70)
    with pytest.raises(ValueError, match="no kernels for sse9 in this build"):
        packed.handle.decode("sse9", 2, 0, 5, out.data_ptr(), 0, 1)


def test_the_best_instruction_set_has_the_highest_priority(monkeypatch):
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    chosen = registry.select("cpu", torch.float32)
    assert chosen.name == ISAS[0]
    priorities = [kernel_of(isa, "").priority for isa in ISAS]
    assert priorities == sorted(priorities, reverse=True)
    assert len(set(priorities)) == len(priorities)
    assert all(kernel_of(isa, name).priority < 0 for isa in ISAS for name in ("int8", "exact")), "only when forced"
