"""Which kernel is chosen, why, and how a person forces one."""

from __future__ import annotations

import pytest
import torch
from helpers import random_weight

from bitstrata.errors import KernelError
from bitstrata.kernels import Kernel, KernelReport, describe, pack, registry, select
from bitstrata.kernels.registry import in_arithmetic, register

FLOAT = "cpu", torch.float32
HALF = "cpu", torch.float16


def small(name, priority, activations="exact", steady_rows=None):
    """A kernel for float32 only that reads stored weights."""

    def reason(device, dtype, forced):
        return None if dtype == torch.float32 else f"{dtype} is too small"

    return Kernel(name, "stored", priority, activations, steady_rows, reason)


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """The real reference kernel and two more, in a table of the test's own."""
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    monkeypatch.setattr(registry, "_KERNELS", {"reference": registry._KERNELS["reference"]})
    register(small("slow", 5))
    register(small("fast", 9))


def test_the_highest_priority_that_can_run_is_chosen():
    assert select(*FLOAT).name == "fast"
    assert select(*HALF).name == "reference"


def test_a_kernel_is_chosen_when_a_weight_is_packed(monkeypatch):
    monkeypatch.setenv("BITSTRATA_KERNEL", "warp")
    with pytest.raises(KernelError, match="BITSTRATA_KERNEL=warp is not a kernel"):
        pack(random_weight(3, 33))
    with pytest.raises(KernelError, match="kernel weft is not a kernel"):
        pack(random_weight(3, 33), kernel="weft")
    weight = pack(random_weight(3, 33), kernel="reference")
    assert weight.linear(torch.randn(2, 33), 2).shape == (2, 3)  # whatever is in the environment now


def test_a_kernel_or_its_variant_computes_in_an_arithmetic():
    mixed, exact = small("mixed", 20, "int8", 16), small("mixed-exact", -1)
    register(mixed)
    register(exact)
    assert in_arithmetic(mixed, "int8", 16) is in_arithmetic(mixed, "exact", 17) is mixed
    assert in_arithmetic(mixed, "exact", 16) is exact
    with pytest.raises(KernelError, match="no kernel computes in int8 arithmetic here: mixed runs"):
        in_arithmetic(mixed, "int8", 17)
    with pytest.raises(KernelError, match="BITSTRATA_KERNEL=mixed computes 3 rows in int8 arithmetic, not in exact"):
        in_arithmetic(select(*FLOAT, "mixed"), "exact", 3)


def test_describe_lists_every_kernel_best_first_with_its_reason():
    assert describe(*HALF) == [
        KernelReport("fast", 9, "torch.float16 is too small"),
        KernelReport("slow", 5, "torch.float16 is too small"),
        KernelReport("reference", 0, None),
    ]
    assert [report.reason for report in describe(*FLOAT)] == [None, None, None]


def test_no_kernel_at_all_is_an_error_that_shows_the_problem():
    with pytest.raises(KernelError, match=r"no kernel can run on cpu with activations in torch\.int8"):
        select("cpu", torch.int8)


def test_a_forced_kernel_is_taken_whatever_its_priority(monkeypatch):
    monkeypatch.setenv("BITSTRATA_KERNEL", "slow")
    assert select(*FLOAT).name == "slow"


def test_a_forced_kernel_that_cannot_run_is_never_replaced(monkeypatch):
    monkeypatch.setenv("BITSTRATA_KERNEL", "fast")
    with pytest.raises(KernelError, match=r"BITSTRATA_KERNEL=fast cannot run here: torch\.float16 is too") as caught:
        select(*HALF)
    assert "unset BITSTRATA_KERNEL" in caught.value.hint


def test_forcing_a_kernel_that_does_not_exist_lists_those_that_do(monkeypatch):
    monkeypatch.setenv("BITSTRATA_KERNEL", "warp")
    with pytest.raises(KernelError, match="BITSTRATA_KERNEL=warp is not a kernel") as caught:
        select(*FLOAT)
    assert caught.value.hint == "kernels: fast, reference, slow"


def test_an_empty_variable_forces_nothing(monkeypatch):
    monkeypatch.setenv("BITSTRATA_KERNEL", "")
    assert select(*FLOAT).name == "fast"


def test_two_kernels_of_one_name_are_refused():
    with pytest.raises(ValueError, match="'fast' is registered twice"):
        register(small("fast", 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_reference_runs_every_floating_dtype(dtype):
    assert registry._KERNELS["reference"].can_run("cpu", dtype) is None


def test_the_reference_says_why_it_cannot_run_integers():
    reason = registry._KERNELS["reference"].can_run("cpu", torch.int32)
    assert reason == "activations are torch.int32, not floating point"
